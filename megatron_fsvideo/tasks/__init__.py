"""What each job trains, on what data and for what loss; how runs are run is the business of `training`."""
