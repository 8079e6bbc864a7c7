"""`capjax train`: pretrains a captioner; the same command again resumes it."""

import argparse

# What a resume may change: how a run is watched, kept and laid out, never what it computes.
MAY_CHANGE = (
    "log_every_steps",
    "checkpoint.*",
    "evaluate.*",
    "reading.*",
    "mesh.*",
    "profile.*",
    "health.*",
    "tensorboard",
    "wandb_project",
    "data.bad_budget",
    "data.schedule",  # by appending, see `check_schedule`
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `capjax train`."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME|FILE[:ARG]",
        help="a shipped config (see `capjax config list`) or a Python file; "
        "--config.a.b=v overrides a field",
    )
    parser.add_argument(
        "--workdir", required=True, help="directory of the run; an earlier run there is resumed"
    )


def run(args: argparse.Namespace) -> None:
    """Checks all that can be checked before the first byte is written, then trains."""
    import contextlib

    from capjax.commands import distributed, runtime, settings

    config = settings.load_config(args.config, args.overrides)
    settings.check_supervised(config, args.config)
    with contextlib.ExitStack() as stack:
        with runtime.rarer_collections():
            runtime.start(args, settings.flatten(settings.resolved_dict(config)))
            peers = distributed.peers()

            from capjax.training.stopping import StopSignals

            stack.enter_context(StopSignals(peers))
            from capjax.commands.build import build_run
            from capjax.commands.defaults import default_config
            from capjax.data.layouts import without_caches
            from capjax.training.workdir import open_workdir

            plan = build_run(config, args.workdir)
        check_schedule(config, args.workdir)
        check_warm_start(plan, args.workdir)
        resolved, defaults = (settings.resolved_dict(x) for x in (config, default_config()))
        workdir = stack.enter_context(
            open_workdir(args.workdir, resolved, MAY_CHANGE, without_caches, defaults)
        )
        train_run(plan, workdir, peers)


def check_schedule(config, workdir: str) -> None:
    """Raises `UserError` where a resume would change which source stood at a position seen."""
    import json

    from etils import epath

    from capjax.checkpoint import list_steps
    from capjax.data.mixture import check_appended
    from capjax.training.spikes import read_rollbacks
    from capjax.training.storage import exists, read_bytes

    root = epath.Path(workdir).expanduser()
    if not config.data.mixture or not exists(root / "config.json"):
        return
    try:
        before = json.loads(read_bytes(root / "config.json"))
        schedule, batch_size = before["data"]["schedule"], before["batch_size"]
    except (ValueError, KeyError, TypeError):  # damaged, or of another version: for `open_workdir`
        return
    rollbacks = [rollback.offset(batch_size) for rollback in read_rollbacks(root)]
    seen = max(list_steps(root / "checkpoints"), default=0) * batch_size + max([0, *rollbacks])
    check_appended(schedule, config.data.schedule, seen)


def check_warm_start(plan, workdir: str) -> None:
    """Raises `UserError` where a new run could not take what `warm_start` says."""
    from etils import epath

    from capjax.checkpoint import list_steps, load_types
    from capjax.commands.summary import check_tokens
    from capjax.training.lora import merge
    from capjax.training.warm_start import fitting_names

    warm, kept = plan.warm_start, epath.Path(workdir).expanduser() / "checkpoints"
    if not warm.path or list_steps(kept):
        return
    theirs = load_types(warm.path)
    names = fitting_names(
        merge(plan.abstract_state.params, 0.0),
        theirs.params,
        include=warm.include,
        exclude=warm.exclude,
        vocab_size=plan.tokenizer.vocab_size,
    )
    check_tokens(plan, theirs, names)


def train_run(plan, workdir, peers=None) -> None:
    """Restores or starts the state, trains to the end, and writes the summary of the run.

    After a spike that is to be passed over it resumes from an earlier checkpoint, in this process.
    Raises `Stopped` where `peers` (default: alone) agreed to stop before the end.
    """
    import gc

    from capjax.training.peers import Peers

    peers = peers or Peers()
    while _train_run(plan, workdir, peers):
        gc.collect()  # the state before must be gone from the devices when the other comes


def _train_run(plan, workdir, peers) -> bool:
    """Trains to the end, or to a spike; whether there was one."""
    import contextlib
    import functools
    import json

    import jax

    from capjax.checkpoint import Checkpointer, step_directory
    from capjax.commands import build, rollback, summary
    from capjax.commands.evaluators import build_evaluators
    from capjax.mesh import place_batch
    from capjax.training.bad_records import BadRecords
    from capjax.training.goodput import LaunchLog, unaccounted_s
    from capjax.training.health import Monitor
    from capjax.training.loop import train
    from capjax.training.machine import MachineAlarms
    from capjax.training.metrics import LastEvaluation, make_writers
    from capjax.training.phases import Phases
    from capjax.training.profile import Tracer
    from capjax.training.progress import Progress
    from capjax.training.spikes import Spiked
    from capjax.training.storage import is_remote
    from capjax.training.watchdog import Watchdog
    from capjax.training.workdir import write_atomic

    config, root = plan.config, workdir.path
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress())
        stack.enter_context(jax.set_mesh(plan.mesh))
        for change in workdir.changes:
            progress.say(f"changed since this run began: {change}")
        if jax.process_index() == 0:
            write_atomic(root / "tokenizer.model", plan.tokenizer.model_bytes)
        if plan.stage is not None:
            stack.callback(plan.stage.close)
            plan.stage.prepare(progress.say)
        phases = Phases(unaccounted_s(root))
        stack.enter_context(
            Watchdog(
                phases,
                plan.health.watchdog_s,
                plan.health.watchdog_slow_s,
                None if is_remote(root) else root / f"hang-{jax.process_index()}.txt",
                peers,
            )
        )
        train_step = compiled_ahead(plan, root, stack)
        checkpointer = stack.enter_context(
            Checkpointer(
                root / "checkpoints",
                run=summary.run_info(plan),
                keep=plan.keep,
                report=progress.say,
            )
        )
        restored = checkpointer.restore_latest(plan.abstract_state)
        if restored is None:
            start_step, state, extra = 0, first_state(plan, progress.say), {}
        else:
            start_step, state, extra = restored
            progress.say(f"resuming after step {start_step} in {root}")
            kept = step_directory(root / "checkpoints", start_step)
            for other in (summary.other_pixels(plan, kept), summary.other_data(plan, kept)):
                if other:
                    progress.say(f"changed since this run began: {other}")
        rollbacks = rollback.kept_rollbacks(root, start_step)
        offset = rollback.data_offset(rollbacks, start_step, extra, config.batch_size)

        def position(step) -> int:
            return step * config.batch_size + offset

        start = position(start_step)
        bad = BadRecords(root, start, config.data.bad_budget)
        open_batches = plan.stage.batches if plan.stage else build.training_batches
        batches = open_batches(plan, start, bad.add)
        if hasattr(batches, "close"):
            stack.callback(batches.close)
        writers = make_writers(
            root,
            restored_step=None if restored is None else start_step,
            tensorboard=config.tensorboard,
            wandb_project=config.wandb_project,
            config=config.to_dict(),
        )
        for writer in writers:
            stack.callback(writer.close)

        machine = MachineAlarms(
            plan.health.memory_share, plan.health.data_wait_share, said_by_each(progress.say)
        )
        monitor = Monitor(plan.health, extra.get("health"))
        measured = LastEvaluation()
        launches = LaunchLog(root if jax.process_index() == 0 else None, phases, start_step)
        stack.callback(launches.keep)

        def save(step, state) -> None:
            settled = plan.stage.settled(state) if plan.stage else state
            kept = {
                "examples_seen": position(step),
                "health": monitor.state(),
                "metrics": measured.at(step),
            }
            checkpointer.save(step, settled, kept)
            launches.keep()

        def host_metrics(step) -> dict[str, int | float]:
            counts = {"rollbacks": len(rollbacks)} if rollbacks else {}
            return bad.metrics(position(step)) | counts | {"goodput": launches.spent().goodput}

        def stop(step) -> str:
            if wanted := peers.stop_before(step):
                return f"{wanted.reason} after step {step}"
            return plan.stage.stop() if plan.stage else ""

        progress.say(summary.describe(plan))
        try:
            _, totals = train(
                state,
                train_step=train_step,
                batches=batches,
                place=plan.stage.place if plan.stage else functools.partial(place_batch, plan.mesh),
                total_steps=plan.total_steps,
                batch_size=config.batch_size,
                start_step=start_step,
                evaluators=build_evaluators(plan, root, progress.say),
                save=save,
                save_every_steps=config.checkpoint.every_steps,
                wait_for_saves=checkpointer.wait,
                writers=[*writers, measured, machine, *(plan.stage.writers if plan.stage else ())],
                log_every_steps=config.log_every_steps,
                progress=progress,
                tracer=Tracer(root / "profile", **config.profile),
                flops_per_image=0.0 if plan.stage else plan.towers.flops_per_example(),
                host_metrics=host_metrics,
                stop=stop,
                monitor=monitor,
                phases=phases,
            )
        except Spiked as spike:
            progress.say(f"a spike: {spike}")
            back = rollback.go_back(
                root, spike, plan.health, config.batch_size, position(spike.step)
            )
            progress.say(
                f"going back to step {back.restored_step}; examples {back.skipped_from:,} to "
                f"{back.skipped_to:,} of the data are passed over"
            )
            return True
        bad_counts = bad.count(position(plan.total_steps))
        with phases.during("save"):
            checkpointer.wait()
        if jax.process_index() == 0:
            facts = summary.run_summary(plan, totals, bad_counts, launches.spent())
            facts["best"] = summary.best(plan, root)
            write_atomic(root / "summary.json", json.dumps(facts, indent=2) + "\n")
            progress.say(summary.closing_words(root, facts))
    return False


def said_by_each(say):
    """`say` for what a process has to say of itself: that of others than the first is mute."""
    import sys

    import jax

    index = jax.process_index()
    return say if index == 0 else lambda line: print(f"process {index}: {line}", file=sys.stderr)


def compiled_ahead(plan, root, stack):
    """The training step, which compiles in a thread from now on; its first call waits for that."""
    from concurrent.futures import ThreadPoolExecutor

    import jax

    from capjax.checkpoint import list_steps
    from capjax.commands import runtime

    if max(list_steps(root / "checkpoints"), default=0) >= plan.total_steps:
        return plan.train_step  # most likely it will not be called

    def compiled():
        with jax.set_mesh(plan.mesh):  # a thread has a mesh of its own
            if plan.stage is not None:
                with runtime.rarer_collections():
                    return plan.stage.compile()
            with runtime.rarer_collections():
                lowered = plan.train_step.lower(*plan.abstract_inputs())
            return lowered.compile()

    pool = ThreadPoolExecutor(1)
    # An error is said at once, not when a compilation of minutes has ended.
    stack.push(lambda kind, *_: pool.shutdown(wait=kind is None, cancel_futures=True))
    step = pool.submit(compiled)
    return lambda *args: step.result()(*args)


def first_state(plan, say):
    """The state before the first step, with what the warm start brings."""
    import jax

    from capjax.checkpoint import load_params
    from capjax.commands.summary import warm_start_changes
    from capjax.training.lora import merge
    from capjax.training.state import with_params
    from capjax.training.warm_start import warm_start

    warm = plan.warm_start
    loaded = load_params(warm.path) if warm.path else None
    # It runs once: on a CPU, optimizing it takes seconds more than it saves.
    is_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 1} if is_cpu else None
    state = jax.jit(plan.init_state, compiler_options=options)()
    if loaded is None:
        return state
    base = merge(state.params, 0.0)
    params, names = warm_start(
        base,
        loaded.params,
        include=warm.include,
        exclude=warm.exclude,
        vocab_size=plan.tokenizer.vocab_size,
    )
    say(f"{len(names)} arrays of step {loaded.step} of {warm.path}, such as {names[0]}")
    for change in warm_start_changes(plan, loaded, names):
        say(f"warm start: {change}")
    return with_params(state, state.params | params)
