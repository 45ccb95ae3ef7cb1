"""What a checkpoint can do: one score per task, and intervals over tasks."""
