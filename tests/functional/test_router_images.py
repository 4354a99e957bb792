"""Pictures of the routing weights, in TensorBoard and from tools/plot_router.py, against the weights that mixed.

The reference is what the mixing kernel returned in the very run; hooks on the routers, sums over ranks and drawing are
what is tested.
"""

import importlib.util
import io
import json
import re
import sys

import numpy
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pretrain_dit
from megatron_fsvideo.config import DIT_PRESETS, DiTJob, FSAEJob, parse_job
from megatron_fsvideo.evaluation.router_figure import router_pixels
from megatron_fsvideo.evaluation.router_images import IMAGE_NAMES
from megatron_fsvideo.kernels import torch_mixing
from tests.functional.cli import ROOT
from tests.functional.runs import debug_arguments, losses, run_to_end
from tests.latent_fixtures import write_latent_dataset

NUM_LAYERS, FIRST_FRAME_TOKENS = 4, 16  # of the dataset's 2 x 4 x 4 latents
CALLS_PER_ITERATION = 4 * (NUM_LAYERS - 1)  # micro-batches x routers
TRAINING = (
    f"--num-layers {NUM_LAYERS} --global-batch-size 8 --micro-batch-size 2 --train-iters 5 --lr 0.01 --clip-grad 0 "
    "--router-lr-mult 30 --log-interval 1"
).split()
PICTURES = ["--router-image-interval", "2"]
LAYOUTS = {  # of four processes
    "tp2_sp_pp2_virtual2_recompute": "--tensor-model-parallel-size 2 --sequence-parallel "
    "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --recompute-granularity full",
    "cp2_dp2_distributed_optimizer": "--context-parallel-size 2 --use-distributed-optimizer",
}


def noting_weights(main, path):
    """`main`, which also saves the weights [s, b, l] of every mix, in order."""

    def run():
        mix, found = torch_mixing.mix, []

        def noting(*arguments):
            result = mix(*arguments)
            found.append(result.weights.detach().clone())
            return result

        torch_mixing.mix = noting
        main()
        torch.save(found, path)

    return run


def over_tokens(found, statistic):
    """[2, layers - 1, layers], as `RouterWeights` has it, of the mixes noted."""
    result = torch.full((2, NUM_LAYERS - 1, NUM_LAYERS), torch.nan)
    for states in range(2, NUM_LAYERS + 1):
        weights = torch.cat([each for each in found if each.shape[-1] == states], dim=1).double()
        assert weights.shape[0] == 2 * FIRST_FRAME_TOKENS
        for kind, part in enumerate(weights.split(FIRST_FRAME_TOKENS)):
            result[kind, states - 2, :states] = part.mean((0, 1)) if statistic == "mean" else part.amax((0, 1))
    return result


def pictures(folder, statistic="maximum"):
    """Iteration -> picture [h, w, 3] in a run's event file."""
    events = EventAccumulator(str(folder / "logs"), size_guidance={"images": 0})
    events.Reload()
    assert sorted(events.Tags()["images"]) == sorted(IMAGE_NAMES.values())
    return {
        event.step: numpy.asarray(Image.open(io.BytesIO(event.encoded_image_string))).astype(int)
        for event in events.Images(IMAGE_NAMES[statistic])
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One process: the dataset, the run's folder and the weights of every mix."""
    folder = tmp_path_factory.mktemp("router")
    data = write_latent_dataset(folder / "data")
    arguments = debug_arguments(data, folder / "one", *TRAINING, *PICTURES)
    run_to_end(arguments, folder / "one.log", main=noting_weights(pretrain_dit.main, folder / "found.pt"))
    return folder, data, torch.load(folder / "found.pt")


@pytest.mark.parametrize("statistic", ["maximum", "mean"])
def test_tensorboard_shows_the_weights_that_mixed(trained, statistic):
    folder, _, found = trained
    shown = pictures(folder / "one", statistic)
    assert sorted(shown) == [2, 4]
    expected = {}
    for iteration in shown:
        calls = slice((iteration - 1) * CALLS_PER_ITERATION, iteration * CALLS_PER_ITERATION)
        expected[iteration] = router_pixels(over_tokens(found[calls], statistic), statistic).numpy().astype(int)
        assert abs(shown[iteration] - expected[iteration]).max() <= 1
    assert abs(shown[4] - expected[2]).max() > 20, "the routers did not move: the comparison would prove nothing"


@pytest.mark.parametrize(
    "name", ["tp2_sp_pp2_virtual2_recompute", pytest.param("cp2_dp2_distributed_optimizer", marks=pytest.mark.slow)]
)
def test_layouts_show_the_same(trained, name):
    folder, data, _ = trained
    arguments = debug_arguments(data, folder / name, *TRAINING, *PICTURES, *LAYOUTS[name].split())
    run_to_end(arguments, folder / f"{name}.log", 4)
    shown, expected = pictures(folder / name), pictures(folder / "one")
    assert shown.keys() == expected.keys()
    for iteration, picture in shown.items():
        assert abs(picture - expected[iteration]).max() <= 2


def test_pictures_change_no_loss(trained):
    folder, data, _ = trained
    run_to_end(debug_arguments(data, folder / "without", *TRAINING), folder / "without.log")
    assert losses(folder / "without" / "logs") == losses(folder / "one" / "logs")


def test_the_tool_plots_the_weights_that_mix(trained):
    folder, data, _ = trained

    def main():
        spec = importlib.util.spec_from_file_location("plot_router", ROOT / "tools" / "plot_router.py")
        module = sys.modules["plot_router"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main()

    common = ["--load", str(folder / "one"), "--data-path", str(data), "--num-samples", "6", "--out"]
    run_to_end([*common, str(folder / "a.png")], folder / "a.log", main=noting_weights(main, folder / "plotted.pt"))
    noted = torch.load(folder / "plotted.pt")
    values = json.loads((folder / "a.json").read_text())
    assert values["iteration"] == 5 and values["num_samples"] == 6 and values["layers"] == [2, 3, 4]
    for statistic, picture in (("maximum", "a.png"), ("mean", "a_mean.png")):
        expected = over_tokens(noted, statistic)
        for kind, name in enumerate(("first_frame", "other_frames")):
            rows = [[torch.nan if weight is None else weight for weight in row] for row in values[statistic][name]]
            torch.testing.assert_close(torch.tensor(rows), expected[kind], rtol=0, atol=1e-6, equal_nan=True)
        image = numpy.asarray(Image.open(folder / picture).convert("RGB"))
        assert image.shape[1] > image.shape[0] > 100 and len(numpy.unique(image.reshape(-1, 3), axis=0)) > 100

    more = [str(folder / "b.png"), "--tensor-model-parallel-size", "2", "--sequence-parallel"]
    run_to_end([*common, *more], folder / "b.log", 2, main)
    shared = json.loads((folder / "b.json").read_text())
    for statistic in IMAGE_NAMES:
        for name, rows in values[statistic].items():
            assert shared[statistic][name][2] == pytest.approx(rows[2], abs=1e-5)


@pytest.mark.parametrize(
    ("job", "argv", "words"),
    [
        (DiTJob, "--router-image-interval 5", "router_image_interval 5 .* name a tensorboard_dir"),
        (DiTJob, "--router-image-interval -1 --tensorboard-dir x", "must be an integer of at least 0, got -1"),
        (DiTJob, "--router-image-interval 5 --tensorboard-dir x --no-layer-memory", "layer_memory False has none"),
        (FSAEJob, "--router-image-interval 5 --tensorboard-dir x", "is for the DiT"),
    ],
)
def test_what_cannot_be_drawn_is_refused(job, argv, words, capsys):
    with pytest.raises(SystemExit):
        parse_job(job, DIT_PRESETS if job is DiTJob else None, argv.split())
    assert re.search(words, capsys.readouterr().err)
