"""Tasks, conversations and their tokens: everything between a file of rows and the Learner's sequences."""
