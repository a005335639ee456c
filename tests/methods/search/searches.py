"""Searches of tiny networks, step by step."""

import torch

from regrow.training.continual import learn
from regrow.training.learner import Boundary, Context, Event, Step, write_replacements
from regrow.training.step import apply_plan


def start(search, context):
    """The state of a search that begins."""
    return search.learner.boundary(search.learner.state, context, Boundary(Event.TASK_START))


def train(search, net, axes, task, schedule, **more):
    """Train, and give where it ended and the state of the training."""
    fitted = learn(net, axes, [task], search.learner, schedule, **more)
    return ended(fitted.model, fitted.axes, task, schedule), fitted.state


def ended(model, axes, task, schedule):
    """The context after the last epoch."""
    steps = -(-len(task.train) // schedule.batch_size)
    return Context(model, axes, task, 0, schedule.epochs, schedule.epochs, steps)


def finalize(search, state, context, target=None):
    """Apply all plans after the last epoch."""
    target = search.space.target if target is None else target
    while True:
        plan, state = search.finalize(state, context, target)
        if plan is None:
            return context, state
        context, state = apply_plan(search.learner, state, context, plan)


def change(search, state, context, plan):
    """Apply a plan."""
    return apply_plan(search.learner, state, context, plan)


def size(search, state, context):
    """The size of the trained part."""
    return search.size(state, context)


def replace_parameters(search, state, context):
    """What replaces parameters when the network is evaluated."""
    return search.learner.parametrize(state, evaluated(context)).values


def evaluated(context):
    """The context of an evaluation."""
    return Context(context.model, context.axes, context.task, eval_task=0, epoch=context.epoch, epochs=context.epochs)


def write(search, state, context):
    """Write masked parameters into the network."""
    write_replacements(search.learner, state, context)


def compute_loss(search, state, context, batch):
    """The loss of a batch as the loop computes it, and what later hooks need of it."""
    step = Step(0, batch, replaced=search.learner.parametrize(state, context))
    return search.learner.loss(state, context, step)


def count_left(context, last):
    """Parameters up to a part, without the scales of dropped operations."""
    nodes = [node for node in context.model.modules() if hasattr(node, "scale")]
    dropped = sum(len(node.ops) for node in nodes) - len(context.axes.branches)
    return (
        sum(p.numel() for n, p in context.model.named_parameters() if context.model.uses_parameter(n, last)) - dropped
    )


def draw(shape, seed=0):
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
