"""The training loop: PyTorch and timm pieces, put in order.

Everything random is a function of the recipe's seed and a counter: the order of (seed, epoch), the augmentation of
(seed, epoch, index), mixing and dropout of (seed, update). So a run that goes on from a checkpoint, in the midst of an
epoch too, reaches the same weights as one that was never interrupted: on the CPU, bit by bit; on GPUs but for rounding,
where backward passes add by atomics, and for what follows from it.

An update takes `data.batch_size` × `grad_accum` × processes images. Their product alone decides which images these are,
and the weights, but for rounding and for what is drawn per batch: with the same `data.batch_size` the draws are the
same as well; with another one mixing, dropout and drop path draw differently, and so do the images that stand in for
those that are skipped. Normalisation by the statistics of a batch, which vision transformers have not, would differ.
"""

import math
import signal
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from vit_efficient.data import iterate
from vit_efficient.train.checkpoint import CHECKPOINT
from vit_efficient.train.evaluation import Evaluation, evaluate
from vit_efficient.train.experiment import Experiment
from vit_efficient.train.healing import FeatureTask, evaluate_features
from vit_efficient.train.hooks import plain
from vit_efficient.train.interrupts import Interrupted, Interrupts
from vit_efficient.train.log import (
    SilentLog,
    describe_coverage,
    describe_epoch,
    describe_result,
    describe_scale,
    describe_start,
    used_memory,
    values_of_epoch,
)
from vit_efficient.train.run_folder import BEST, RunFolder
from vit_efficient.train.state import TrainState, seed_everything
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import writing
from vit_efficient.utils.precision import autocast

MAX_NONFINITE = 25  # updates left out in a row (`on_nonfinite`), then the run ends


class Trainer:
    """Takes a state, from where it stands, through the epochs of its experiment; the run's folder is open."""

    def __init__(self, experiment: Experiment, state: TrainState, folder: RunFolder, log: SilentLog, stop: Interrupts):
        self.experiment = experiment
        self.state = state
        self.folder = folder
        self.log = log
        self.stop = stop
        self.unreadable: dict[int, str] = {}  # training images since the last update

    def fit(self) -> dict[str, Any]:
        """Trains to the end, and returns what result.json holds; an empty dict in other processes than the first.

        Raises:
            Interrupted: After a signal, once a checkpoint is saved.
        """
        state, experiment = self.state, self.experiment
        try:
            self.stop.obey()
            if experiment.config.sched.epochs:
                self.log.say(describe_scale(experiment))
                self.log.say(describe_coverage(experiment))
            if state.progress.updates:
                self.log.say(describe_start(experiment, state.progress, self.folder.path))
            self._begin_stage()
            evaluation, model = self.epochs(), state.evaluated
            for hook in experiment.hooks:
                model, evaluation = hook.end(self, model, evaluation)
            model = state.whole(model)
            with writing(self.folder.path, '; resume=auto goes on from the checkpoint'):
                return self.finish(model, evaluation) if experiment.team.is_first else {}
        except Interrupted as stop:
            self.save()
            message = f'stopped by {signal.Signals(stop.signal).name} after update {state.progress.updates}'
            raise Interrupted(stop.signal, f'{message}; {self.folder.path / CHECKPOINT} is saved') from None

    def epochs(self) -> Evaluation:
        """Trains the epochs that are left, and evaluates the last one; without any the model as it is."""
        config, state, progress = self.experiment.config, self.state, self.state.progress
        if not config.sched.epochs:
            return self.measure(state.evaluated)
        while True:
            self.epoch()
            if config.data.on_error == 'skip':
                with self.stop.held():
                    self.log.write('skipped', progress.epoch, progress.updates, {'images': progress.epoch_skipped})
            stage_ends = progress.epoch + 1 == self.experiment.stages[state.stage].end
            if stage_ends or (progress.epoch + 1) % config.checkpoint_every == 0:
                self.save()
            if stage_ends or (progress.epoch + 1) % config.eval_every == 0:
                evaluation = self.evaluate()
                self._keep_best(evaluation)
            else:
                self.log.say(describe_epoch(self.experiment, progress))
            if progress.epoch + 1 == config.sched.epochs:
                return evaluation
            if stage_ends:
                for hook in self.experiment.hooks:
                    hook.end_stage(self, self.experiment.stages[state.stage + 1], evaluation)
            with self.stop.held():
                progress.begin_epoch()
                if stage_ends:
                    progress.stages.append(evaluation.accuracies)
                    state.enter_stage(state.stage + 1)
                    state.wrap()
            if stage_ends:
                self._begin_stage()

    def epoch(self) -> None:
        """The updates of an epoch that are still to be done."""
        experiment, state, progress = self.experiment, self.state, self.state.progress
        config, images = experiment.config, experiment.images_per_update
        done = progress.updates - progress.epoch * experiment.updates_per_epoch
        if done == experiment.updates_per_epoch:
            return
        state.forward.train()
        experiment.feed.sampler.set_epoch(progress.epoch, start=done * images)
        self.unreadable = {}
        batches = iterate(experiment.feed.train_loader, self.unreadable, experiment.team.device, False)
        bar = tqdm(
            desc=f'epoch {progress.epoch + 1}/{config.sched.epochs}',
            total=experiment.updates_per_epoch * images,
            initial=done * images,
            unit=' images',
            disable=None if experiment.team.is_first else True,
        )
        clock = time.perf_counter()
        with bar:
            for _ in range(done, experiment.updates_per_epoch):
                chunk = list(islice(batches, config.grad_accum))
                with self.stop.held():
                    loss = self.update(chunk)
                    now = time.perf_counter()
                    seconds, clock = now - clock, now
                    progress.train_seconds += seconds
                    if loss is not None:
                        if progress.updates % config.log_every == 0:
                            values = {'loss': loss, 'lr': state.lr, 'images_per_second': images / seconds}
                            self.log.write('train', progress.epoch, progress.updates, values)
                        memory = f'{used_memory(experiment.team.device) / 1e9:.2f} GB'
                        bar.set_postfix(loss=f'{loss:.3f}', memory=memory, refresh=False)
                bar.update(images)
                self.stop.obey()
                if config.checkpoint_steps and progress.updates % config.checkpoint_steps == 0:
                    self.save()
                    clock = time.perf_counter()

    def update(self, chunk: Sequence[tuple[Tensor, ...]]) -> float | None:
        """One step of the optimiser on `grad_accum` micro-batches of every process.

        Forward and backward pass of each micro-batch, in the last of which gradients are averaged over the processes;
        one exchange of what all must know (losses, norm, signals, images left out); then, if that is finite, the step
        of `TrainState.step`.

        Returns:
            The mean loss of all; None if it or its gradient is not finite, and all have left out the step.
        """
        experiment, state, progress = self.experiment, self.state, self.state.progress
        team, count = experiment.team, len(chunk)
        losses = []
        for number, (*tensors, _) in enumerate(chunk):
            # The number of the batch among those of all processes: a single one would draw the same.
            key = (progress.updates * count + number) * team.world_size + team.rank
            seed_everything('step', experiment.config.seed, key)
            with state.without_sync(number + 1 < count):
                loss = self.loss(*tensors)
                (loss / count).backward()
            losses.append(loss.detach())
        for hook in experiment.hooks:
            hook.before_step(state)
        norm = state.gradient_norm()
        rows = team.exchange([*losses, norm], (self.stop.received, len(self.unreadable)))
        *_, norms, signals, skipped = zip(*rows, strict=True)
        self.stop.hear(map(int, signals))
        mean = sum(sum(row[:count]) / count for row in rows) / len(rows)  # one that is not finite makes it so for all
        length = math.hypot(*norms) if experiment.sharded else norms[team.rank]
        of_stage = progress.updates + 1 - experiment.stages[state.stage].start * experiment.updates_per_epoch
        finite = math.isfinite(mean) and math.isfinite(length)
        if finite:
            state.step(norm.new_full((), length) if experiment.sharded else norm, of_stage)
            progress.nonfinite_in_row = 0
        elif math.isfinite(mean):
            self._leave_out('the gradient is not finite', [indices for *_, indices in chunk])
        else:
            values = rows[team.rank][:count]
            suspects = [indices for value, (*_, indices) in zip(values, chunk, strict=True) if not math.isfinite(value)]
            self._leave_out(f'the loss is {mean}', suspects)
        state.optimizer.zero_grad()
        if state.scheduler:
            state.scheduler.step_update(of_stage)
        if any(skipped):
            for reasons in team.gather(self.unreadable):
                progress.skip(reasons)
                self.log.name_skipped('training', reasons)
            self.unreadable.clear()
        progress.updates += 1
        progress.loss_sum += mean if finite else 0.0
        return mean if finite else None

    def loss(self, images: Tensor, *truth: Tensor) -> Tensor:
        """That of a micro-batch, with what hooks add to it."""
        experiment, state = self.experiment, self.state
        images = experiment.feed.train_samples.normalize(images.to(memory_format=experiment.layout))
        if state.mixup:
            images, *truth = state.mixup(images, *truth)

        def forward(*given: Any) -> Any:
            with autocast(images.device, experiment.config.amp):
                return state.forward(*given)

        logits, loss = experiment.task.learn(state.model, forward, images, truth, state.criterion)
        for hook in experiment.hooks:
            loss = hook.penalty(state, images, logits, loss)
        return loss

    def _leave_out(self, what: str, suspects: list[Tensor]) -> None:
        """Counts an update without a step, or ends the run, as the recipe's policy is.

        `what` is not finite, for one of the `suspects`: indices of samples of this process, by micro-batch.
        """
        experiment, progress = self.experiment, self.state.progress
        filename = experiment.feed.train_samples.filename
        names = experiment.team.gather([filename(int(index)) for batch in suspects for index in batch])
        files = ', '.join(name for of_process in names for name in of_process)
        message = f'{what} at update {progress.updates + 1} (epoch {progress.epoch + 1}), images {files}'
        if experiment.config.on_nonfinite == 'error':
            raise UserError(f'{message}; the weights are unchanged; on_nonfinite=skip goes on without it')
        progress.nonfinite += 1
        progress.epoch_nonfinite += 1
        progress.nonfinite_in_row += 1
        if progress.nonfinite_in_row == MAX_NONFINITE:
            raise UserError(f'{message}; with it, {MAX_NONFINITE} updates in a row were left out')
        self.log.say(f'left out: {message}')
        self.log.write('nonfinite', progress.epoch, progress.updates + 1, {'updates': progress.nonfinite})

    def save(self) -> None:
        """Writes the checkpoint, the same however the work is split; all processes call, the first one writes."""
        team = self.experiment.team
        if team.is_first or self.experiment.sharded:
            state = self.state.state_dict()
            if team.is_first:
                self.folder.save_checkpoint(state, self.experiment.config.checkpoint_keep)

    def measure(self, model: nn.Module) -> Evaluation:
        """Evaluates a model on the validation set."""
        task, loader, team = self.experiment.task, self.experiment.feed.val_loader, self.experiment.team
        amp, after_batch = self.experiment.config.amp, self.stop.check
        if isinstance(task, FeatureTask):
            return evaluate_features(model, loader, team, task, amp, True, after_batch)
        return evaluate(model, loader, team, amp, task, True, after_batch)

    def evaluate(self) -> Evaluation:
        """Evaluates the model at the end of an epoch, and tells."""
        experiment, state, progress = self.experiment, self.state, self.state.progress
        evaluation = self.measure(state.evaluated)
        measured = {hook.name: plain(hook.measure(self), f'what {hook.name} measures') for hook in experiment.hooks}
        values = values_of_epoch(experiment, state, evaluation)
        self.log.name_skipped('validation', evaluation.skipped)
        with self.stop.held():
            for kind, line in {'val': values, **measured}.items():
                if line:
                    self.log.write(kind, progress.epoch, progress.updates, line)
        self.log.say(describe_epoch(experiment, progress, evaluation))
        return evaluation

    def _begin_stage(self) -> None:
        stages, number = self.experiment.stages, self.state.stage
        if self.experiment.config.stages:
            self.log.say(f'stage {number + 1}/{len(stages)}: {stages[number]}')
        for hook in self.experiment.hooks:
            hook.begin_stage(self)

    def _keep_best(self, evaluation: Evaluation) -> None:
        """Saves the model if its top-1, or the mIoU where there is none, is above that of all evaluations before."""
        experiment, progress, accuracies = self.experiment, self.state.progress, evaluation.accuracies
        name = experiment.task.metric
        if experiment.config.checkpoint_best and accuracies[name] > progress.best.get(name, -math.inf):
            model = self.state.whole(self.state.evaluated)
            if experiment.team.is_first:
                model = experiment.task.product(model)
                with writing(self.folder.path / BEST, '; the checkpoint is as it was, resume=auto goes on from it'):
                    self.folder.save_model(model, experiment, BEST)
            progress.best = {'epoch': progress.epoch, **accuracies}

    def finish(self, model: nn.Module, evaluation: Evaluation) -> dict[str, Any]:
        """Writes the model and, last, what result.json holds, which is returned."""
        experiment, progress = self.experiment, self.state.progress
        model = experiment.task.product(model)
        self.folder.save_model(model, experiment)
        result = describe_result(experiment, progress, model, evaluation)
        skipped = [reason for _, reason in sorted(progress.skipped.items())]
        filename = experiment.feed.val_samples.filename
        return self.folder.write_result(result, evaluation, filename, skipped, experiment.classes)
