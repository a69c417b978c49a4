"""The command line `asteroid-tiny`: its subcommands, each one function with options of its own.

A subcommand is a function of the parsed options behind `command`; what it needs it imports itself,
so that ``--help`` and a wrong option do not wait for it.
"""

import argparse
import math
import os
import sys
from pathlib import Path

from .errors import UserError, exit_on_user_error

#: By name: the function that runs a subcommand, and what adds its options to a parser.
COMMANDS = {}


def command(name, add_options=None):
    """Registers a function as a subcommand; the first line of its docstring is its help.

    Args:
        name (str): Of the subcommand.
        add_options (callable, optional): Takes the `argparse.ArgumentParser` to add options to,
            and the function takes what was parsed. Without it the function takes the list of
            arguments as it stands.
    """

    def register(function):
        COMMANDS[name] = (function, add_options)
        return function

    return register


def _separate_options(parser):
    parser.epilog = (
        "Writes NAME_est1, NAME_est2, .. for each recording, one file a speaker, mono, at the rate "
        "of the recording. What is there already is left as it is. Exit status: 0 if all is well, "
        "1 if some recordings could not be separated, 2 if an option is wrong. Beside programs "
        "that keep all cores busy OMP_NUM_THREADS=1 in the environment makes it faster."
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="recordings, folders of them, or globs in quotes")
    add("-m", "--model", metavar="MODEL", help="name, file, address or hub id of a model; by "
        "default one of two packaged for two speakers: of 16 kHz for recordings of that rate and "
        "above, else of 8 kHz")  # fmt: skip
    add("-o", "--out", default="separated", metavar="DIR", help="folder to write to (%(default)s)")
    add("--format", default="wav", choices=("wav", "flac", "ogg"), help="default: %(default)s")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ..; a GPU by default, if there is one")
    add("--block", type=float, default=4.0, metavar="SECONDS", help="length of the overlapping "
        "blocks that the model gets, half of which overlaps (%(default)s); a recording of up to "
        "three is one block")  # fmt: skip
    add("--batch", type=int, metavar="N", help="blocks at a time (1, on a GPU 8)")
    add("--force", action="store_true", help="write anew what is there")
    add("--no-mixture-consistency", action="store_true", help="leave the estimates as the model "
        "gives them; by default they are brought to sum to the recording")  # fmt: skip
    add("--peak", type=float, metavar="DB", help="bring the highest sample of each recording's "
        "files to this level re full scale, such as -1; by default the gain is 1, less only where "
        "a file would clip")  # fmt: skip


@command("separate", _separate_options)
def separate(options):
    """Separates recordings of any length into one file a speaker."""
    from .longform.folder import separate_all

    try:
        n_failed = separate_all(**vars(options))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on with the recordings that are left")
    if n_failed:
        sys.exit(1)


def _info_options(parser):
    parser.add_argument("model", metavar="MODEL", help="name, file, address or hub id of a model")


@command("info", _info_options)
def info(options):
    """Tells what a model is, what it was trained on, and what it costs to run."""
    from .inspection import describe, open_model

    print(describe(*open_model(options.model)))


def main(argv=None):
    """Runs ``asteroid-tiny``; a `UserError` is one line on stderr and exit status 2.

    Args:
        argv (list of str, optional): What stands behind the name; that of the process by default.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="asteroid-tiny", description="Tiny-Sepformer's tools.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (function, add_options) in COMMANDS.items():
        title = function.__doc__.strip().splitlines()[0]
        subparser = subparsers.add_parser(name, help=title, description=title)
        if add_options is not None:
            add_options(subparser)
        elif argv[:1] == [name]:
            with exit_on_user_error():
                return function(argv[1:])
    options = parser.parse_args(argv)
    function, _ = COMMANDS[vars(options).pop("command")]
    if hasattr(sys.stdout, "reconfigure"):  # names of files may be what no encoding knows
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with exit_on_user_error():
            function(options)
            sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _check_options(parser):
    parser.epilog = "Exit status: 0 if all is well, 1 if something was found."
    add = parser.add_argument
    add("path", metavar="DIR_OR_LIST", type=Path, help="Kaldi data dir, a folder of those of "
        "train, valid and test, or a mixture list (CSV)")  # fmt: skip
    add("--speech", metavar="DIR", help="of a list: the data dir of its utterances")
    add("--noise", metavar="DIR", help="of a list: the data dir of its noises")
    add("--sample_rate", type=int, metavar="HZ", help="rate that is needed (that of most files)")
    add("--shortest", type=float, default=0.0, metavar="SECONDS", help="report shorter utterances")


@command("check", _check_options)
def check(options):
    """Finds what is wrong with speech or a mixture list before a training does."""
    from .data.check import check_list, check_speech, format_findings

    if options.sample_rate is not None and options.sample_rate < 1:
        raise UserError(f"--sample_rate must be at least 1 Hz, not {options.sample_rate}")
    if not 0 <= options.shortest < math.inf:
        raise UserError(f"--shortest must be 0 s or more, not {options.shortest:g}")
    of_a_list = {"speech": options.speech, "noise": options.noise}
    of_speech = {"sample_rate": options.sample_rate, "shortest": options.shortest}
    kind, idle = ("a folder", of_a_list) if options.path.is_dir() else ("a list", of_speech)
    for key, value in idle.items():
        if value:
            raise UserError(f"--{key} has no effect on {kind}")
    if options.path.is_dir():
        findings = check_speech(options.path, options.sample_rate, options.shortest)
    elif options.speech is None:
        raise UserError(f"{options.path} is no folder; for a mixture list give --speech, too")
    else:
        findings = check_list(options.path, options.speech, options.noise)
    print(format_findings(findings) or "nothing found")
    if findings:
        sys.exit(1)


def _evaluate_options(parser):
    add = parser.add_argument
    add("model", metavar="MODEL", help="name, file, address or hub id of a model, or an ONNX file")
    add("speech", metavar="DIR", help="Kaldi data dir of speakers whom the model never heard")
    add("-o", "--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    add("-n", "--n_mixtures", type=int, default=300, metavar="N", help="mixtures (%(default)s)")
    add("--speakers", default="*", metavar="PATTERN", help="only speakers such as 'so*'")
    add("--seed", type=int, default=202, help="of the mixtures (%(default)s)")
    add("--segment", type=float, default=4.0, metavar="SECONDS", help="length (%(default)s)")
    add("--n_speakers", type=int, metavar="N", help="in a mixture: as many as the model separates, "
        "or fewer, and the level of the estimates that are nobody's is told")  # fmt: skip
    add("--overlap", type=float, default=1.0, metavar="RATIO", help="how much of a mixture two "
        "speakers share: 0 if they take turns, 1 if all talk all along (%(default)s)")  # fmt: skip
    add("--reverb", action="store_true", help="let each mixture be heard in a simulated room")
    add("--snr", type=float, metavar="DB", help="add noise, so much softer than the speech,")
    add("--noise_dir", metavar="DIR", help="of recordings in this folder; else it is simulated")
    add("--microphone", action="store_true", help="let each mixture be heard by a simulated "
        "microphone or telephone")  # fmt: skip
    add("--device", default="cpu", help="cpu, cuda, ... (%(default)s)")


@command("evaluate", _evaluate_options)
def evaluate(options):
    """Measures a model on mixtures of unseen speakers: SI-SDR, BSS-eval, STOI, a page to listen."""
    from .data import (
        InSurroundings,
        MixtureList,
        RecordedNoise,
        SpeechDir,
        draw_list,
        write_list,
    )
    from .evaluation import evaluate
    from .files import temporary_folder
    from .inspection import find_device, open_model
    from .report import write_report
    from .summary import format_table

    if options.n_mixtures < 1 or options.seed < 0 or not 0.01 <= options.segment < 3600:
        raise UserError(
            "--n_mixtures must be at least 1, --seed at least 0, --segment 0.01 to 3600 seconds"
        )
    if not 0 <= options.overlap <= 1:
        raise UserError(f"--overlap must be from 0 to 1, not {options.overlap:g}")
    if options.snr is not None and not -100 <= options.snr <= 100:
        raise UserError(f"--snr must be from -100 to 100 dB, not {options.snr:g}")
    if options.noise_dir == "":
        raise UserError("--noise_dir needs the name of a folder")
    if options.noise_dir and options.snr is None:
        raise UserError("--noise_dir needs --snr, the level of the speech re the noise")
    recorded = RecordedNoise(options.noise_dir) if options.noise_dir else None
    device = find_device(options.device)
    model, _ = open_model(options.model)
    n_speakers = model.n_src if options.n_speakers is None else options.n_speakers
    if not 1 <= n_speakers <= model.n_src:
        raise UserError(f"--n_speakers must be from 1 to {model.n_src} for this model")
    if n_speakers == 1 and options.overlap != 1:
        raise UserError("--overlap has no effect with one speaker")
    rate = round(model.sample_rate)
    speech = SpeechDir(options.speech, rate, convert=True).of(options.speakers)
    length = round(options.segment * rate)
    mixtures = draw_list(
        speech,
        options.n_mixtures,
        n_speakers,
        length,
        options.seed,
        overlap_ratio=options.overlap,
    )
    with temporary_folder() as folder:
        write_list(Path(folder) / "list.csv", mixtures, rate)
        dataset = MixtureList(speech, Path(folder) / "list.csv")
    surroundings = (options.reverb, options.snr, recorded, options.microphone)
    if options.reverb or options.snr is not None or options.microphone:
        dataset = InSurroundings(dataset, options.seed, *surroundings)
    summary = evaluate(model, dataset, options.out / "results", device)
    write_list(options.out / "list.csv", mixtures, rate)  # which the old results had, until now
    print(f"{format_table(summary)}\n\n{write_report(options.out / 'results', str(options.model))}")


def _average_options(parser):
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="trainings that went on from the same weights")
    add("-o", "--out", type=Path, required=True, metavar="FILE.pth", help="file to write")


@command("average", _average_options)
def average(options):
    """Writes the model whose weights are the means of those of others."""
    from .files import sweep
    from .hub import locate
    from .models import from_pretrained
    from .transfer import average
    from .weights import open_stored

    if options.out.exists():
        raise UserError(f"{options.out} is there already; give another name")
    mean = average([from_pretrained(name) for name in options.models])
    told = [open_stored(locate(name)).infos for name in options.models]
    licences = [infos.get("licence") for infos in told]
    data = [infos.get("training", {}).get("data") for infos in told]
    about = {}  # what they agree in
    if licences[0] and licences.count(licences[0]) == len(told):
        about["licence"] = licences[0]
    if data[0] and data.count(data[0]) == len(told):
        about["training"] = {"data": data[0]}
    sweep(options.out.parent)
    mean.save(options.out, **about)
    print(options.out)


def _export_options(parser):
    add = parser.add_argument
    add("model", metavar="MODEL", help="name, file, address or hub id of a model")
    add("-o", "--out", type=Path, required=True, metavar="FILE", help="file to write")
    add("--format", default="onnx", choices=("onnx",), help="(%(default)s)")
    add("--quantize", choices=("int8",), help="weights of 8 bits, if the estimates stay close")


@command("export", _export_options)
def export(options):
    """Writes a model as an ONNX file, once it is seen to agree with the model."""
    from .export import OnnxSeparator, export_onnx
    from .inspection import open_model

    if options.out.suffix != ".onnx":
        raise UserError(f"{options.out}: name the file *.onnx, by which its format is known again")
    model, about = open_model(options.model)
    if isinstance(model, OnnxSeparator):
        raise UserError(f"{options.model} is an ONNX file already; give the model that it is of")
    done = export_onnx(model, options.out, options.quantize, about=about)
    told = ", ".join(f"{key} {value:.3g}" for key, value in done.items() if key != "bytes")
    print(f"{options.out}: {done['bytes'] / 1e6:.2f} MB, {told}")


#: Options of what a new publish folder says.
NEW = ("out", "name", "data_name", "data_licence", "data_url", "data_author", "licence", "half")
#: Options of its metrics.
METRICS_BY = ("summary", "test_name", "made_by")


def _publish_options(parser):
    parser.add_argument("source", help="folder of a run, a publish folder, or any model")
    parser.add_argument("--out", type=Path, help="folder to write (SOURCE/publish for a run)")
    parser.add_argument("--name", help="name of the model")
    parser.add_argument("--data_name", help="name of the training data")
    parser.add_argument("--data_licence", help="licence of the training data")
    parser.add_argument("--data_url", help="where the training data is described")
    parser.add_argument("--data_author", help="who made the training data")
    parser.add_argument(
        "--licence",
        help="licence of the weights (that of SOURCE if it tells one, else cc-by-sa-3.0)",
    )
    parser.add_argument("--summary", type=Path, help="metrics: results/summary.json of a stage 3")
    parser.add_argument(
        "--test_name", help="what data the metrics are of (the training data's test)"
    )
    parser.add_argument("--command", dest="made_by", help="the command that made the metrics")
    parser.add_argument("--half", action="store_true", help="store weights in 16 bits, if they can")
    parser.add_argument("--onnx", action="store_true", help="add the model as an ONNX file")
    parser.add_argument("--zoo", action="store_true", help="add it to the models of this package")
    parser.add_argument("--push", metavar="USER/REPO", help="upload it to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="make a new repository private")


@command("publish", _publish_options)
def publish(options):
    """Writes a model with its model card for others, and uploads it if asked."""
    from . import publish as publishing

    folder = Path(options.source)
    _refuse_idle(options, publishing.is_published(folder))
    if not publishing.is_published(folder):
        folder = _publish_run(options) if (folder / "conf.yml").exists() else _publish_any(options)
        print(f"publish folder: {folder}")
    if options.onnx:
        from .export import export_onnx
        from .inspection import open_model

        model, about = open_model(folder)
        export_onnx(model, folder / publishing.ONNX, about=about)
    if options.zoo:
        print(f"packaged model: {publishing.add_to_zoo(folder)}")
    if options.push is not None:
        print(f"on the hub: {publishing.push(folder, options.push, options.private)}")


def _refuse_idle(options, published):
    """Refuses options that the source does not take, rather than publish what they contradict."""
    idle = {"private": "without --push"} if options.push is None else {}
    if published:
        ready = f"since {options.source} is published already; give the run or the model instead"
        idle |= dict.fromkeys((*NEW, *METRICS_BY), ready)
    elif (Path(options.source) / "conf.yml").exists():
        idle |= dict.fromkeys(METRICS_BY, "since a run has its own")
    for key, why in idle.items():
        if getattr(options, key):
            raise UserError(f"--{'command' if key == 'made_by' else key} has no effect {why}")


def _publish_run(options):
    from .config import PUBLICATION, read_run
    from .recipe import publish_model

    settings = read_run(options.source)
    given = {key: getattr(options, key) for key in PUBLICATION if getattr(options, key)}
    about = {"name": options.name} if options.name else {}
    return publish_model(options.source, settings, options.out, given, **about)


def _publish_any(options):
    from .hub import locate
    from .models import Sepformer, from_pretrained
    from .publish import publish
    from .speechbrain import is_speechbrain
    from .summary import read_summary
    from .weights import open_stored

    for key in ("out", "name", "summary"):
        if getattr(options, key) is None:
            raise UserError(f"a model that is no run of a recipe is published with --{key}")
    foreign = is_speechbrain(options.source)
    told = {} if foreign else open_stored(locate(options.source)).infos
    load = Sepformer.from_speechbrain if foreign else from_pretrained
    training = dict(told.get("training", {}))
    data = training.pop("data", {})
    if options.data_name not in (None, data.get("name")):
        data = {}  # of other data, whose licence says nothing of these
    about = {
        "name": options.name,
        "training": training,
        **{
            f"data_{key}": getattr(options, f"data_{key}") or data.get(key)
            for key in ("name", "licence", "url", "author")
        },
    }
    about["licence"] = options.licence or told.get("licence") or "cc-by-sa-3.0"
    about |= {"command": options.made_by, "test_name": options.test_name}
    about["summary"] = read_summary(options.summary)
    return publish(load(options.source), options.out, about, options.half)


def _demo_options(parser):
    add = parser.add_argument
    add("-m", "--model", action="append", default=[], metavar="MODEL", help="name, file, address "
        "or hub id of a model, beside the packaged ones; may be given again")  # fmt: skip
    add("--minutes", type=float, default=5.0, help="of a recording, at most (%(default)g)")
    add("--megabytes", type=float, default=100.0, help="of an upload, at most (%(default)g)")
    add("--keep", type=float, default=30.0, metavar="MINUTES", help="for which files of visitors "
        "are kept (%(default)g)")  # fmt: skip
    add("--port", type=int, help="to listen at; a free one from 7860 on by default")
    add("--device", default="auto", help="cpu, cuda, ..; a GPU by default, if there is one")


@command("demo", _demo_options)
def demo(options):
    """Serves a page to this machine's browser: drop or record speech, hear and see the speakers."""
    from .demo import serve

    for name in ("minutes", "megabytes", "keep"):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name} must be above 0")
    if options.port is not None and not 1 <= options.port <= 65535:
        raise UserError(f"--port must be from 1 to 65535, not {options.port}")
    serve(
        options.model,
        options.minutes,
        options.megabytes,
        options.keep,
        options.port,
        options.device,
    )


@command("infer")
def infer(argv):
    """Separates files with asteroid-infer's options, for models of Asteroid and of this package."""
    from .infer import infer

    infer(argv)


if __name__ == "__main__":
    main()
