"""The command line: Hydra composes the config; bad input becomes one sentence and status 2."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from shared.errors import UserError, unknown
from shared.runner.papers import paper_names, register_search_path
from shared.runner.paths import CONF, PAPERS
from shared.runner.sweep import current_sweep, end_sweep, run_label, statuses

HELP = """\
Check the headline numbers of machine-learning efficiency papers.

  python run.py paper=NAME                      reduced scale, the paper's own device
  python run.py paper=NAME device=ID            ... on another device
  python run.py paper=NAME claims=[ID,ID]       only what these claims need
  python run.py paper=NAME scale=full           the paper's sizes; timings need a GPU
  python run.py -m 'paper=glob(*)' seed=0,1,2   the whole suite
  python run.py calibrate=cpu                   measure this machine (or cuda) and write its device file

Papers     {papers}
Devices    {devices}
Scales     smoke (seconds, judges no trained claim), reduced (default, minutes), full

Keys
  claims=all|[ID,...]     which claims                       control=true      also run with the paper's idea off
  seed=N                  base seed                          sensitivity=true  which figure, moved how far, flips a verdict
  out=FOLDER              results.json, report.html          force=true        ignore the cache
  tracking=offline|wandb|none                                strict=true       status 1 if a claim is not replicated
  threads=N workers=N     torch threads, worker processes    data.root=FOLDER  real data sets
  KEY=VALUE               any key of the paper's config: python run.py paper=NAME --cfg job

Status 0: everything ran. 1: an experiment broke (or strict=true). 2: bad input. 130: interrupted, nothing lost.
"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of ``run.py``; exits with the run's status."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"}.intersection(argv):
        devices = sorted(path.stem for path in (CONF / "device").glob("*.yaml"))
        print(HELP.format(papers=", ".join(paper_names()), devices=_wrapped(devices)))
        sys.exit(0)
    if any(argument.startswith("calibrate=") for argument in argv):
        sys.exit(_calibrate(argv))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors over instead of printing them and exiting with 1
    signal.signal(signal.SIGTERM, _terminate)
    try:
        register_search_path()
        sys.argv = [sys.argv[0], *argv]
        _hydra_main()
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sys.exit(_report(error))
    finally:
        end_sweep()
    sys.exit(max(statuses, default=0))


def _calibrate(argv: Sequence[str]) -> int:
    """Measure this machine instead of checking a paper; no paper, device or scale has a say in it."""
    from shared.calibrate import command

    signal.signal(signal.SIGTERM, _terminate)
    try:
        print(command.run(argv))
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    except Exception as error:
        return _report(error)
    return 0


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _hydra_main(config: DictConfig) -> int:
    try:
        status = run_composed(config, Path(HydraConfig.get().runtime.output_dir))
    except Exception as error:  # Hydra would print a line of its own; and the other jobs of a sweep go on
        status = _report(error)
    if sweep := current_sweep():
        sweep.advance()
    statuses.append(status)
    return status


def run_composed(config: DictConfig, folder: Path) -> int:
    """Execute one composed config, write everything into ``folder`` and return the exit status."""
    from shared.runner.display import TerminalDisplay
    from shared.runner.execute import execute, exit_status, results_folder
    from shared.runner.sinks import write_results

    with_out = OmegaConf.merge(config, {"out": str(folder)})
    container: Any = OmegaConf.to_container(with_out, resolve=True, throw_on_missing=True)
    results_folder(folder)
    label, sweep = run_label(config), current_sweep()
    with sweep.display(label) if sweep else TerminalDisplay(label=label) as display:
        run, document = execute(container, display)
        path = write_results(run, document, folder, display)
    for experiment in run.experiments:
        if experiment.problem:
            print(experiment.problem, file=sys.stderr)
    display.finish(document)
    if not label:
        print(path)  # a sweep ends with the folder of all its runs
    return exit_status(run)


def _report(error: Exception) -> int:
    """Print an error and return its exit status: one sentence and 2 for the user's, the traceback and 1 for ours."""
    sentence = _sentence(error)
    if sentence is None:
        traceback.print_exc()
        return 1
    print(f"error: {sentence}", file=sys.stderr)
    return 2


def _terminate(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _sentence(error: Exception) -> str | None:
    """One sentence for an error of the user's, None for one of ours."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, YAMLError):
        return f"a config file is not valid YAML: {text}; mend the file"
    if match := re.search(r"Could not find '(\w+)/([^']*)'", text):
        group, name = match.groups()
        return str(unknown(group, name, _options(group)))
    if match := re.search(r"You must specify '(\w+)'", text):
        group = match.group(1)
        return f"say which {group}: {group}=NAME, one of: {', '.join(_options(group))}"
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match.group(1))
    if isinstance(error, HydraException | OmegaConfBaseException):
        reason = text.split(" See https")[0]
        return f"cannot read the command line {' '.join(sys.argv[1:])}: {reason}; python run.py --help shows how"
    if isinstance(error, OSError) and error.filename:
        return f"{text}; free some space or choose another folder with out=FOLDER"
    return None


def _options(group: str) -> list[str]:
    folders = [CONF, *(PAPERS / name / "conf" for name in paper_names())]
    return sorted(path.stem for folder in folders for path in (folder / group).glob("*.yaml"))


def _unknown_key(key: str) -> str:
    """Name the keys that exist where ``key`` was looked for."""
    from hydra.core.global_hydra import GlobalHydra

    known: list[str] = []
    choices = [argument for argument in sys.argv[1:] if re.match(r"(paper|device|scale|tracking)=\w+$", argument)]
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra.compose("config", choices)
    except HydraException:
        return str(unknown("key", key, known))
    *parents, _ = key.split(".")
    node = OmegaConf.select(config, ".".join(parents)) if parents else config
    if isinstance(node, DictConfig):
        known = [".".join([*parents, str(name)]) for name in node]
    return str(unknown("key", key, known))


def _wrapped(names: Sequence[str], width: int = 100, indent: int = 11) -> str:
    import textwrap

    return textwrap.fill(", ".join(names), width, subsequent_indent=" " * indent, break_long_words=False)
