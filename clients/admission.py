"""Admission: a task that asks for less privacy or more work than a node's settings do is refused, before it is charged.

On a device the settings are those of the run that its node joined; what its owner demands of all runs is in pins.py.
"""

from clients import coordinates
from clients.steps import local_steps
from clients.task import Task
from privacy import accounting, local_noise, noise_shares, noisy_counts
from privacy.refused import Refused
from scenarios.settings import Settings


def check(task: Task, settings: Settings, examples: int) -> None:
    """Raises Refused where a client with so many training examples is asked for what `settings` do not ask for."""
    if task.kind == "train":
        _private(task, settings)
        _steps(task, settings, examples)
        if task.control is not None and not settings.local.scaffold:
            raise Refused("the task has a control variate that this node's settings do not ask for")
        coordinates.hold_to(task.coordinates, coordinates.split(settings.codec)[0], len(task.weights))
    elif task.kind == "evaluate":
        _evaluation(task, settings, examples)


def _private(task: Task, settings: Settings) -> None:
    wanted, number = settings.privacy, settings.rounds.number + settings.export.recover_rounds
    if wanted.by_example and (task.mechanism is None or task.clip != wanted.clip):
        raise Refused("the task is without the differential privacy that this node's settings ask for")
    norms = {task.update_clip} - {0.0} if wanted.adapt else {wanted.update_norm}
    if wanted.by_client and task.update_clip not in norms:
        raise Refused("the task is without the clipping norm that this node's settings ask for")
    if wanted.unit == "local":
        asked = task.update_clip, task.update_noise
        local_noise.hold_to(*asked, wanted.clip, wanted.epsilon, wanted.delta, number)
    if wanted.by_shares:
        least = task.protection.minimum if task.protection else None
        noise_shares.hold_to(task.shares, wanted.epsilon, wanted.delta, number, least, wanted.colluding)


def check_noise(task: Task, settings: Settings, examples: int) -> None:
    """Raises Refused where all rounds at the noise of `task` would cost an example more than `settings` allow.

    By the accountant, and so for devices, which have one client to ask for.
    """
    wanted = settings.privacy
    if task.kind != "train" or not wanted.by_example or task.mechanism is None:
        return
    steps = (settings.rounds.number + settings.export.recover_rounds) * local_steps(settings.local, examples, True)
    delta = wanted.delta or accounting.default_delta(examples)
    if not task.mechanism.noise_multiplier > 0 or accounting.epsilon({task.mechanism: steps}, delta) > wanted.epsilon:
        raise Refused("the task is with less noise on gradients than this node's settings ask for")


def _steps(task: Task, settings: Settings, examples: int) -> None:
    local = settings.local
    most = local_steps(local, examples, settings.privacy.by_example) if examples else 0
    if task.steps > most:
        why = f"local.steps={local.steps}" if local.steps else f"local.epochs={local.epochs} over {examples} examples"
        raise Refused(f"the task asks for {task.steps} steps, a round has {most} by this node's settings ({why})")


def _evaluation(task: Task, settings: Settings, examples: int) -> None:
    epsilon = settings.evaluation.epsilon
    if settings.evaluation.on != "clients":
        raise Refused("the task asks for test results, which this node's settings let no client send")
    if epsilon is not None and task.mechanism is None:
        raise Refused("the task is without the noise on test results that this node's settings ask for")
    if epsilon is None and task.mechanism is not None:
        raise Refused("the task asks for noise on test results that this node's settings do not ask for")
    if epsilon is not None and task.mechanism is not None:
        delta = settings.privacy.delta or accounting.default_delta(max(1, examples))
        noisy_counts.hold_to(task.mechanism, settings.evaluations, epsilon, delta)
