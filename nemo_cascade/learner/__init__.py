"""The trainable policy on Megatron-core: start-up, the step, the checkpoint. Import its modules where they are used."""
