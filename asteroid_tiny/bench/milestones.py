"""What a training costs and gives at points of its way: a callback of Lightning."""

import hashlib
import statistics
import time

import pytorch_lightning as pl
import torch
from asteroid.losses import PITLossWrapper, pairwise_neg_sisdr

from ..errors import UserError
from ..summary import mean_interval
from ..training import validation_loader
from .machine import cpu_name, peak_bytes, reset_peak


class Points(pl.Callback):
    """Measures a training at equal shares of its two budgets, and ends it when both are used.

    Its state travels with the checkpoints, so that a training that continues has all of it.

    Args:
        valid_set (MixtureList): What SI-SDRi is measured on.
        conf (dict): `budget_steps`, `budget_minutes` (of device time; 0 for no such budget),
            `budget_points`, and what `validation_loader` takes.
        at_steps (set of int): Steps after which it measures, of the budget of steps.
    """

    def __init__(self, valid_set, conf, at_steps):
        self.valid_set, self.conf = valid_set, conf
        count, minutes = conf["budget_points"], conf["budget_minutes"]
        self.at_steps = at_steps
        self.at_seconds = [k * 60 * minutes / count for k in range(1, count + 1)]
        self.state = {
            "device": None,
            "seconds": 0.0,
            "step_seconds": [],
            "memory": 0,
            "batches": "",
            "points": [],
        }

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state

    def on_train_start(self, trainer, system):
        self.meter = Meter(system.device)
        device = self.state["device"] = self.state["device"] or self.meter.name
        if device != self.meter.name:
            raise UserError(
                f"{trainer.default_root_dir} was begun on {device}, not on {self.meter.name}; go "
                "on there, or delete that folder"
            )
        trainer.should_stop = self.is_done(trainer)

    def on_train_batch_start(self, trainer, system, batch, batch_idx):
        mixtures = batch[0].cpu().numpy().tobytes()
        self.state["batches"] = hashlib.sha256(
            self.state["batches"].encode() + mixtures
        ).hexdigest()
        self.began = self.meter.seconds()

    def on_train_batch_end(self, trainer, system, outputs, batch, batch_idx):
        took = self.meter.seconds() - self.began
        before, after = self.state["seconds"], self.state["seconds"] + took
        self.state["seconds"] = after
        self.state["step_seconds"].append(took)
        self.state["memory"] = max(self.state["memory"], self.meter.memory())
        if trainer.global_step in self.at_steps or any(
            before < s <= after for s in self.at_seconds
        ):
            self.add_point(trainer, system)
            self.meter.reset()  # the memory of the validation is not that of a step
        trainer.should_stop = self.is_done(trainer)

    def is_done(self, trainer):
        """Whether both budgets are used."""
        return (
            trainer.global_step >= max(self.at_steps)
            and self.state["seconds"] >= self.at_seconds[-1]
        )

    def add_point(self, trainer, system):
        """Takes note of where the training is, and of the SI-SDRi of its weights."""
        with trainer.precision_plugin.forward_context():
            values = improvements(system.model, self.valid_set, self.conf)
        mean, low, high = mean_interval(values, self.speakers())
        self.state["points"].append(
            {
                "steps": trainer.global_step,
                "seconds": self.state["seconds"],
                "si_sdr_i": mean,
                "low": low,
                "high": high,
                "values": [round(value, 4) for value in values],
                "batches": self.state["batches"],
            }
        )

    def result(self):
        """All that was measured (dict)."""
        return {
            "device": self.state["device"],
            "step_seconds": statistics.median(self.state["step_seconds"]),
            "step_memory": self.state["memory"],
            "speakers": self.speakers(),
            "points": self.state["points"],
        }

    def speakers(self):
        """Who speaks in each validation mixture (list of tuple of str)."""
        return [self.valid_set.describe(i)["speakers"] for i in range(len(self.valid_set))]


def improvements(model, valid_set, conf):
    """SI-SDRi in dB of every mixture, averaged over its sources under their best order.

    Args:
        model (torch.nn.Module): (batch, time) -> (batch, n_src, time).
        valid_set (MixtureList): The mixtures.
        conf (dict): What `validation_loader` takes.

    Returns:
        list of float: One a mixture.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    found = []
    with torch.inference_mode():
        for mixtures, sources in validation_loader(valid_set, conf):
            estimates = model(mixtures.to(device)).float().cpu()
            with torch.autocast("cpu", enabled=False):  # which would round them
                before = _si_sdr(mixtures[:, None].expand_as(sources), sources)
                found += (_si_sdr(estimates, sources) - before).tolist()
    model.train(was_training)
    return found


def _si_sdr(estimates, sources):
    loss, _ = PITLossWrapper.find_best_perm(pairwise_neg_sisdr(estimates, sources))
    return -loss


class Meter:
    """Time and memory of a device: of a GPU, or of this process on a CPU.

    Args:
        device (torch.device): The device.
    """

    def __init__(self, device):
        self.is_gpu = device.type == "cuda"
        threads = torch.get_num_threads()
        on_cpu = f"CPU ({cpu_name()}), {threads} thread{'s' * (threads > 1)}"
        self.name = torch.cuda.get_device_name(device) if self.is_gpu else on_cpu
        self.loaded = 0
        self.reset()
        self.loaded = self.memory()

    def seconds(self):
        """Time that work took so far: by the clock on a GPU, all threads' CPU time on a CPU."""
        if not self.is_gpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def memory(self):
        """The most bytes held since `reset`, beyond those held in the beginning."""
        if self.is_gpu:
            return torch.cuda.max_memory_allocated() - self.loaded
        return peak_bytes() - self.loaded

    def reset(self):
        """Forgets the most that was held."""
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()
            return
        reset_peak()
