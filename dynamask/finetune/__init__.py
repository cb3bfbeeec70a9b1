"""Fine-tuning of a trained model on a few labelled photos, within a given time.

`photos` prepares the data, `plan` measures this machine's speed and makes the configuration of the run; the training is that of
`dynamask.train`.
"""
