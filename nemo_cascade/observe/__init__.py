"""What a run leaves to read: metrics, rollouts, trackers and the progress line. Without torch."""
