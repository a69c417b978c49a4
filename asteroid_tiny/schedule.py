"""How long a training is, and its learning rate at each step."""

import torch


def whole_epochs(conf):
    """The settings of a training of whole epochs into which its schedule fits.

    Args:
        conf (dict): The keys of the `training` section.

    Returns:
        dict: The same with `steps` a multiple of `steps_per_epoch`, which is at most `steps`, and
        with `warmup_steps` and `cooldown_steps` shortened alike where together they are more than
        `steps`, so that `lr` is reached.

    Examples:
        >>> conf = dict(steps=450, steps_per_epoch=100, warmup_steps=100, cooldown_steps=700)
        >>> whole_epochs(conf)
        {'steps': 400, 'steps_per_epoch': 100, 'warmup_steps': 50, 'cooldown_steps': 350}
    """
    per_epoch = min(conf["steps"], conf["steps_per_epoch"])
    steps = round(conf["steps"] / per_epoch) * per_epoch
    ramps = {key: conf[key] for key in ("warmup_steps", "cooldown_steps")}
    share = min(1.0, steps / max(1, sum(ramps.values())))
    ramps = {key: int(share * n) for key, n in ramps.items()}
    return {**conf, "steps": steps, "steps_per_epoch": per_epoch, **ramps}


class Schedule(torch.optim.lr_scheduler.LRScheduler):
    """Warm-up, halving on plateau, and a final descent to zero; counted in steps.

    The rate rises linearly over `warmup_steps`, is halved whenever `observe` has seen no better
    validation loss more than `patience` times in a row after the first `hold_steps`, and over the
    last `cooldown_steps` of `total_steps` falls linearly to zero.

    Args:
        optimizer (torch.optim.Optimizer): Whose rates are set.
        total_steps (int): Steps of the whole training.
        warmup_steps (int): Steps of the rise.
        cooldown_steps (int): Steps of the descent; 0 for none.
        patience (int): Validations in a row without a better loss that are borne; at the next one
            the rate is halved, as PyTorch and SpeechBrain count.
        hold_steps (int): First steps, in which it is not halved and nothing is observed.
    """

    def __init__(
        self, optimizer, total_steps, warmup_steps=0, cooldown_steps=0, patience=2, hold_steps=0
    ):
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.cooldown_steps = cooldown_steps
        self.patience = patience
        self.hold_steps = hold_steps
        self.best = float("inf")
        self.n_worse = 0
        self.n_halvings = 0
        super().__init__(optimizer)

    def get_lr(self):
        step = self.last_epoch + 1  # the step that this rate is for, counted from one
        factor = 0.5**self.n_halvings
        if self.warmup_steps:
            factor *= min(1.0, step / self.warmup_steps)
        if self.cooldown_steps:
            factor *= min(1.0, max(0, self.total_steps - step + 1) / self.cooldown_steps)
        return [base * factor for base in self.base_lrs]

    def observe(self, val_loss):
        """Takes note of a validation loss (float), which counts from the next `step` on."""
        if self.last_epoch < self.hold_steps:
            return
        if val_loss < self.best:
            self.best, self.n_worse = val_loss, 0
            return
        self.n_worse += 1
        if self.n_worse > self.patience:
            self.n_halvings, self.n_worse = self.n_halvings + 1, 0
