"""Trains one run.

loop          the training loop, and what a run's folder holds
build         makes data, models and optimizers from the settings
step          one update of the weights
calibration   z* in training, the weight of its L1 penalty, the revival of unused heads
chunked       an update of a batch that does not fit into memory
checkpoint    saves and loads
stop          what happens at Ctrl-C
nonfinite     updates that are skipped because the loss is not finite
processes     several processes, one batch
log           metrics.jsonl, the progress bar
boards        TensorBoard and wandb
telemetry     measures collapse
"""
