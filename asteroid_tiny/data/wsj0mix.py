"""WSJ0-2mix and WSJ0-3mix as their scripts write them (Hershey et al., 2016).

::

    {2,3}speakers/wav{8,16}k/{min,max}/{tr,cv,tt}/{mix,s1,s2[,s3]}/NAME.wav

NAME tells the utterances of WSJ0 and their levels, ``01aa010k_1.3053_01po0310_-1.3053``; an
utterance begins with the three characters of its speaker. The speakers of ``cv`` are those of
``tr``; those of ``tt`` are others.
"""

from ..errors import UserError
from . import mixed

PARTS = {"train": "tr", "valid": "cv", "test": "tt"}
OFFICIAL = {"train": 20000, "valid": 5000, "test": 3000}
#: Splits that must not share a speaker with any other.
DISJOINT = ("train", "test"), ("valid", "test")


def check_options(settings):
    """Refuses options that WSJ0-mix does not have.

    Raises:
        UserError: If there is one.
    """
    mixed.check_values(settings, "WSJ0-mix", mode=("min", "max"), **mixed.BOTH)


def prepare(source, target, settings):
    """Writes the data dirs train, valid and test, and says what differs from the official corpus.

    Args:
        source (Path): The folder that holds ``2speakers`` or ``3speakers``.
        target (Path): Where the data dirs go.
        settings (dict): `n_src`, `sample_rate` and `mode` of conf.yml.

    Raises:
        UserError: If files are missing or have other names than WSJ0-mix's.
    """
    check_options(settings)
    n_src = settings["n_src"]
    tree = f"{n_src}speakers/wav{settings['sample_rate'] // 1000}k/{settings['mode']}"
    for split, part in PARTS.items():
        root = source / tree / part
        names = sorted({path.stem for path in root.glob("s[123]/[!.]*.wav")})
        if not names:
            raise UserError(f"there is no wav file in {root / 's1'}; {_hint(source, tree, n_src)}")
        mixed.write_split(root, target / split, names, lambda name: speakers_of(name, n_src))
        mixed.report_sums(root, "mix", names, [f"s{k}" for k in range(1, n_src + 1)])
        mixed.report_count(split, len(names), OFFICIAL[split])
    print("  the speakers of valid may be those of train, as WSJ0-mix has it; those of test not")


def _hint(source, tree, n_src):
    if (source / tree).is_dir():
        return f"{source / tree} must hold tr, cv and tt, each with mix, s1, s2 and so on"
    there = sorted(str(path.relative_to(source)) for path in source.glob("[23]speakers/wav*k/m*"))
    if there:
        return f"{source} has {', '.join(there)}; see --n_src, --sample_rate and --mode"
    return (
        f"give the folder that holds {n_src}speakers, as the scripts of WSJ0-mix write it, as "
        "--speech"
    )


def speakers_of(name, n_src):
    """Speakers of a mixture by its name.

    Examples:
        >>> speakers_of("01aa010k_1.3053_01po0310_-1.3053", 2)
        ['01a', '01p']
    """
    fields = name.split("_")
    if len(fields) != 2 * n_src:
        raise UserError(f"{name}.wav is not named as WSJ0-mix names mixtures of {n_src} speakers")
    return [utterance[:3] for utterance in fields[::2]]


def check(speech, settings):
    """Refuses sources that are cut short, see `mixed.mixtures`."""
    mixed.mixtures(speech)


def mixtures(split, speech, noise, settings):
    """The mixtures of a split (list of `Mixture`)."""
    return mixed.mixtures(speech)
