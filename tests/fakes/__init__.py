"""Stand-ins, test data and test harnesses that several test modules share."""
