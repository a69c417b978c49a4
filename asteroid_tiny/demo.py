"""A page in the browser: drop or record speech, then see, hear and download the speakers.

``asteroid-tiny demo`` serves it to this machine alone. A Hugging Face space needs
``asteroid-tiny[demo]`` in its requirements.txt and an app.py of two lines::

    from asteroid_tiny.demo import build_page, launch
    launch(build_page())

The page loads nothing from elsewhere and nothing is sent elsewhere, though a request made by hand
can have Gradio fetch a recording from a public address. Each visitor's files lie in folders of
their own, whose names cannot be guessed, until they are deleted.
"""

import base64
import contextlib
import html
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from .errors import UserError
from .files import reason, temporary_folder
from .hub import list_models
from .inspection import DEFAULT, WIDE, default_for, find_device, made_for, open_model
from .longform.audio import open_recording, resample
from .longform.blocks import separate_file
from .longform.folder import notes_on
from .plots import loudest, spectrogram

SHORTEST = 0.5  # s; less holds nothing that can be told apart
MINUTES = 5.0  # of a recording
MEGABYTES = 100.0  # of an upload
KEPT_MINUTES = 30.0  # for which files are kept
LAST = 30.0  # s that the end of the page waits for that of a separation
WAITING = 16  # visitors whose recordings wait for their turn
BY_RATE = "two speakers, by the rate of the recording"  # a choice of the page, beside the models
IMAGE = (
    '<img alt="spectrogram of {}" src="data:image/png;base64,{}" '
    'style="width: 100%; height: 7.5rem; border-radius: 4px">'
)


def build_page(models=(), minutes=MINUTES, kept_minutes=KEPT_MINUTES, device="auto"):
    """Builds the page.

    Args:
        models (list of str): Models before the packaged ones, as `inspection.open_model` takes
            them. The first is the default; without any it is `BY_RATE`, for which
            `inspection.default_for` chooses.
        minutes (float): Length of a recording, at most.
        kept_minutes (float): For which files are kept.
        device (str): Where the models run; "auto" is a GPU, if there is one.

    Returns:
        gradio.Blocks: For `launch`.

    Raises:
        UserError: If there is no such model or device, or Gradio is not installed.
    """
    gr = _gradio()
    device, opened, sentences = find_device(device), {}, {}
    for name in dict.fromkeys([*models, *list_models()]):
        model, about = open_model(name)
        opened[name] = model.to(device)
        sentences[name] = _paragraph(f"{made_for(name, model, about)}.")
    sentences[BY_RATE] = sentences[DEFAULT] + sentences[WIDE]
    names = list(dict.fromkeys([*models, BY_RATE, *opened]))
    n_tracks = max(model.n_src for model in opened.values())

    def separate(path, name, progress=gr.Progress()):
        def tell(share):
            if not page.is_running:
                raise UserError("the page was closed")
            progress(share)

        def model_for(sample_rate):
            return opened[default_for(sample_rate) if name == BY_RATE else name]

        found, picture, said = [], "", "There is no recording yet: drop a file, or record one."
        if path is not None:
            try:
                with page.turn:
                    folder = tempfile.mkdtemp(dir=page.GRADIO_CACHE)  # which is served and cleared
                    done = separate_upload(model_for, path, folder, minutes, tell)
                found, picture, said = done
            except UserError as error:
                said = str(error)
            except OSError as error:  # of a folder that finds no room
                said = f"The files could not be written: {reason(error)}."
        updates = [_paragraph(said), picture]
        for k in range(n_tracks):
            target, picture = found[k] if k < len(found) else (None, None)
            updates += [gr.Column(visible=target is not None), picture, target, target]
        return updates

    kept = 60 * kept_minutes
    with gr.Blocks(
        title="asteroid-tiny", analytics_enabled=False, delete_cache=(min(60, kept), kept)
    ) as page:
        gr.Markdown(
            "# Separate speakers\nOne file for each speaker of a recording of up to "
            f"{minutes:g} minutes. All files are deleted here after {kept_minutes:g} minutes."
        )
        with gr.Row():
            recording = gr.Audio(label="Recording", type="filepath", editable=False, buttons=[])
            with gr.Column():
                chosen = gr.Dropdown(names, value=names[0], label="Model")
                sentence = gr.HTML(sentences[names[0]])
                button = gr.Button("Separate", variant="primary")
        shown = [gr.HTML(elem_id="status"), gr.HTML()]
        with gr.Row():
            for k in range(n_tracks):
                with gr.Column(visible=False, min_width=300) as track:
                    shown += [track, gr.HTML()]
                    shown.append(gr.Audio(label=f"Speaker {k + 1}", buttons=[]))
                    shown.append(gr.DownloadButton(f"Download speaker {k + 1}"))
        chosen.change(sentences.get, chosen, sentence, api_visibility="private")
        button.click(separate, [recording, chosen], shown, api_visibility="private")
    page.kept = kept
    page.turn = threading.Lock()  # of whoever writes files: one visitor at a time
    return page.queue(max_size=WAITING)


def separate_upload(model_for, path, folder, minutes, progress):
    """Separates what a visitor gave.

    Args:
        model_for (callable): From the rate of a recording in Hz to a model as
            `longform.separate_file` takes it.
        path (str): The recording.
        folder (str): An empty folder for the files.
        minutes (float): Length of a recording, at most.
        progress (callable): Told the share that is done.

    Returns:
        tuple: File and picture as HTML of each speaker, in a list; picture of the recording; a
        sentence on what was done.

    Raises:
        UserError: If it cannot be separated; names no folder.
    """
    path, folder = Path(path), Path(folder)
    try:
        with open_recording(path) as recording:
            model = model_for(recording.sample_rate)
        targets = [folder / f"{path.stem}_est{k}.wav" for k in range(1, model.n_src + 1)]
        mixture = read(path, model.sample_rate, minutes)
        share = 0.0

        def tell(seconds, _):
            nonlocal share
            share = min(1.0, share + seconds * model.sample_rate / len(mixture))
            progress(share)

        done = separate_file(model, path, targets, progress=tell)
        tracks = [read(target, model.sample_rate, minutes) for target in targets]
    except UserError as error:
        told = str(error).replace(f"{path.parent}{os.sep}", "").replace(f"{folder}{os.sep}", "")
        raise UserError(told) from None
    top = loudest([mixture, *tracks])
    images = [_image(f"speaker {k}", track, top) for k, track in enumerate(tracks, 1)]
    said = f"{path.name}: {done['seconds']:.1f} s separated{notes_on(done)}."
    return list(zip(map(str, targets), images)), _image("the recording", mixture, top), said


def read(path, sample_rate, minutes):
    """A recording of bounded length as samples (numpy.ndarray) of a rate.

    Raises:
        UserError: If it is too long or too short, or cannot be read.
    """
    pieces = []
    with open_recording(path) as recording:
        most = 60 * minutes * recording.sample_rate
        for piece in resample(recording.pieces(), recording.sample_rate, sample_rate):
            pieces.append(piece)
            if max(recording.n_read, recording.n_samples or 0) > most:
                raise UserError(f"{path} is longer than the {minutes:g} minutes allowed here")
        if recording.n_read < SHORTEST * recording.sample_rate:
            seconds = recording.n_read / recording.sample_rate
            raise UserError(
                f"{path} is too short: {seconds:.2g} s, where {SHORTEST:g} s are needed"
            )
    return np.concatenate(pieces)


def launch(page, megabytes=MEGABYTES, port=None, **options):
    """Serves the page until the process is stopped.

    Args:
        page (gradio.Blocks): That of `build_page`.
        megabytes (float): Of an upload, at most.
        port (int, optional): To listen at; a free one from 7860 on by default.
        **options: For Gradio's ``launch``.

    Raises:
        UserError: If the port is taken.
    """
    threading.Thread(target=_clear, args=(page,), daemon=True).start()
    options = {"footer_links": ["gradio"], "run_history": False, "pwa": False, **options}
    try:
        page.launch(
            share=False,
            server_port=port,
            max_file_size=round(2**20 * megabytes),
            enable_monitoring=False,
            ssr_mode=False,
            **options,
        )
    except (OSError, OverflowError) as error:  # the latter of ports above 65535
        raise UserError(f"the page cannot be served: {' '.join(str(error).split())}") from None


def serve(models, minutes, megabytes, kept_minutes, port, device):
    """Builds and serves the page until Ctrl-C or a SIGTERM, and leaves no file behind."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with temporary_folder("asteroid-tiny-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # before Gradio is imported
        page = build_page(models, minutes, kept_minutes, device)
        launch(page, megabytes, port, quiet=True, prevent_thread_lock=True)
        print(f"the page is at {page.local_url} (stop it with Ctrl-C)", flush=True)
        page.block_thread()
        page.close(verbose=False)  # which ends a separation that is running
        page.turn.acquire(timeout=LAST)  # wait for its end


def _clear(page):
    """Deletes for good what Gradio forgets: parts of uploads that were broken off."""
    while True:
        time.sleep(min(60, page.kept))
        for part in Path(page.GRADIO_CACHE).glob("tmp*"):
            with contextlib.suppress(OSError):  # it is a folder, or has just become a file
                if time.time() - part.stat().st_mtime > page.kept:
                    part.unlink()


def _image(name, samples, top):
    return IMAGE.format(name, base64.b64encode(spectrogram(samples, top)).decode())


def _paragraph(sentence):
    return f"<p>{html.escape(sentence)}</p>"


def _gradio():
    try:
        import gradio
    except ImportError:
        raise UserError(
            "gradio is not installed; run: python -m pip install -e '.[demo]' in the repository of "
            "asteroid-tiny"
        ) from None
    return gradio
