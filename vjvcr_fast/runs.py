"""Loading a trained model, applying it to frames, saving it to share.

model = vjvcr_fast.load("runs/my-run")      # or a folder that save_pretrained wrote, or "user/repo"
h = model.encode(frames)                    # (N, T, C, H, W) -> (N, T, d)
model.save_pretrained("my-model")

A saved model is two files, config.json and model.safetensors. They are read and written here. huggingface_hub only
downloads them, so that a folder can be loaded without it. Its PyTorchModelHubMixin would need most of this all the
same: it cannot save weights in channels_last, as ours are, it reads no config with groups, and it is not strict.
"""

import re
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vjvcr_fast import __version__
from vjvcr_fast.config import Config, ConfigError, override, resolve_device
from vjvcr_fast.data import files
from vjvcr_fast.data.video.file import resize
from vjvcr_fast.models.energy import EnergyModel
from vjvcr_fast.training import checkpoint
from vjvcr_fast.training.build import build_model
from vjvcr_fast.training.calibration import Latents
from vjvcr_fast.training.checkpoint import CheckpointError

CONFIG = "config.json"
WEIGHTS = checkpoint.SAVED
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@\S+)?")  # of the Hugging Face Hub: user/name, or user/name@revision
PLACES = {"data.root": "", "data.cache": "", "train.device": "auto"}  # what a shared config does not tell
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Trained:
    """A run's best model (lowest validation loss) in eval mode.

    Gradients flow as through any module. If you need features only, call it under torch.no_grad().

    config: the run's Config. model: its EnergyModel; model.encoder, model.predictor and model.decoder are modules.
    d: the number of features of a frame's representation.
    """

    def __init__(self, config: Config, model: EnergyModel) -> None:
        self.config, self.model, self.d = config, model, config.d
        self._latents = Latents(config, model)

    def encode(self, frames: Tensor) -> Tensor:
        """The representations h (N, T, d), float32, of frames (N, T, C, H, W).

        frames: of any size and on any device, uint8 or floating point in [0, 1]. C is 3 or the run's number of
        channels. Frames are resized to the run's canvas. Raises ValueError for other frames.
        """
        return self.model.encoder(self.prepare(frames))

    def predict(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The predicted representations (N, T_y, d) of the frames that follow x.

        x: (N, T_x, C, H, W), frames as in `encode`. y: the true frames that follow, (N, T_y, C, H, W). It is needed if
        the run has a latent: z* is inferred from x and y, and the prediction is made with it.
        Raises ValueError if the number of frames is not the run's, or if y is missing.
        """
        data = self.config.data
        for name, given, wanted in (("x", x, data.frames_in), ("y", y, data.frames_out)):
            if given is not None and given.ndim == 5 and given.shape[1] != wanted:
                raise ValueError(f"{name} has {given.shape[1]} frames: the run's {wanted} are needed")
        if self.config.latent.kind == "none":
            return self.model.predict(self.prepare(x))
        if y is None:
            raise ValueError(f"the run has a latent ({self.config.latent.kind}): y is needed to infer it")
        return self._latents.predict(self.prepare(x), self.prepare(y))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors into a folder, for `vjvcr_fast.load`.

        Paths of data and the device stay out of the config. Training cannot go on from it: there is no optimizer.

        Raises ConfigError if the folder is that of a run; ImportError, naming the extra, if safetensors is missing.
        """
        library, folder = files.load("safetensors.torch", "hub"), Path(folder)
        if (folder / "best.pt").exists() or checkpoint.exists(folder):
            raise ConfigError(f"{folder}: the folder of a run; choose another one for the saved model")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(self.model).items()}
        content = library.save(weights, {"format": "pt", "vjvcr_fast": __version__})
        files.write_atomic(folder / WEIGHTS, content)
        files.write_atomic(folder / CONFIG, override(self.config, PLACES).to_json())

    def prepare(self, frames: Tensor) -> Tensor:
        """Converts frames (as in `encode`) to the model's input: (N, T, C, S, S), float32 in [0, 1], on its device."""
        data = self.config.data
        if frames.ndim != 5 or frames.shape[2] not in (3, data.channels):
            kinds = f"(N, T, C, H, W) with C = {' or '.join(map(str, sorted({3, data.channels})))}"
            raise ValueError(f"frames have shape {tuple(frames.shape)}: {kinds} is needed")
        if frames.dtype != torch.uint8 and not frames.is_floating_point():
            raise ValueError(f"frames are {frames.dtype}: uint8, or floating point in [0, 1], is needed")
        frames = frames.to(next(self.model.parameters()).device)
        flat, size = frames.flatten(0, 1), (data.canvas, data.canvas)
        if frames.dtype == torch.uint8:
            flat = resize(flat, size).float().div_(255)
        elif flat.shape[-2:] != size:
            flat = F.interpolate(flat.float(), size=size, mode="bilinear", antialias=True)
        if data.channels == 1 and flat.shape[1] == 3:
            flat = (flat * flat.new_tensor(LUMA).view(3, 1, 1)).sum(dim=1, keepdim=True)
        return flat.float().unflatten(0, frames.shape[:2])


def load(run: str | Path, device: str = "auto") -> Trained:
    """Loads a trained model: a run, or what `Trained.save_pretrained` or `vjvcr-fast export` wrote.

    run: a folder. A string "user/repo" or "user/repo@revision" that is no folder is a repository of the Hugging Face
    Hub; its two files are downloaded, or taken from the cache of earlier downloads. device: "auto" (CUDA if available),
    "cpu", "cuda" or "cuda:N".

    Raises ConfigError or CheckpointError, which name the file, if there is no model or its weights are not those of its
    config; ImportError, naming the extra, if safetensors or huggingface_hub is needed and missing.
    """
    folder = Path(run)
    if isinstance(run, str) and REPOSITORY.fullmatch(run) and not folder.exists():
        folder = _download(run)
    config, model = load_run(folder, override(Config.load(folder / CONFIG), {"train.device": device}))
    return Trained(config, model)


def load_run(run: Path, config: Config | None = None) -> tuple[Config, EnergyModel]:
    """The config of a run and its best model (lowest validation loss) in eval mode; or of a folder of a saved model.

    config: by default config.json of the run. Pass one to change the device, the path of the data, `evaluate.*` or how
    z* is found (`config.INFERENCE`). In the returned config, `latent.weight` is the calibrated weight from the
    checkpoint.

    Raises ConfigError or CheckpointError, which name the file, if the folder does not hold a run or a saved model.
    """
    config = config or Config.load(run / CONFIG)
    device = resolve_device(config.train.device)
    model, file = build_model(config, device), weights_of(run)
    if file.name == WEIGHTS:
        _restore(file, model)
        return config, model.eval()
    state = checkpoint.load(file)
    checkpoint.restore(file, state, model=model)
    return override(config, {"latent.weight": state.get("latent_weight", config.latent.weight)}), model.eval()


def weights_of(run: Path) -> Path:
    """The file of a run's best model, or of a saved model."""
    return run / (WEIGHTS if (run / WEIGHTS).exists() else "best.pt")


def _download(repository: str) -> Path:
    """The folder of a repository's two files, in huggingface_hub's cache."""
    name, _, revision = repository.partition("@")
    try:
        hub = files.load("huggingface_hub", "hub")
    except ImportError as error:
        raise ImportError(f"{repository}: no such folder, and to look on the Hugging Face Hub: {error}") from None
    try:
        folder = Path(hub.snapshot_download(name, revision=revision or None, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # of the HTTP library too, which depends on the version
        why = files.one_line(f"{type(error).__name__}: {files.reason(error)}")
        raise CheckpointError(f"{repository}: no such folder, and not from the Hugging Face Hub: {why}") from error
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).exists():
            raise CheckpointError(f"{repository}: has no {file} on the Hugging Face Hub")
    return folder


def _tensors(model: EnergyModel) -> dict[str, Tensor]:
    """The model's weights and statistics by name, each once: `twin` shares its weights with `encoder`."""
    kept = model.state_dict().keys()
    return {name: t for name, t in chain(model.named_parameters(), model.named_buffers()) if name in kept}


@torch.no_grad()
def _restore(file: Path, model: EnergyModel) -> None:
    """Reads the weights of a saved model. Raises CheckpointError unless the file has exactly those of the model."""
    library = files.load("safetensors.torch", "hub")
    try:
        found = library.load_file(file)
    except Exception as error:
        why = files.one_line(files.reason(error))
        raise CheckpointError(f"{file}: damaged, or not a safetensors file: {why}") from None
    wanted = _tensors(model)
    wrong = [f"missing {name}" for name in wanted if name not in found]
    wrong += [f"unexpected {name}" for name in sorted(found.keys() - wanted)]
    for name in wanted.keys() & found.keys():
        if (has := found[name].shape) != (needs := wanted[name].shape):
            wrong.append(f"{name} has shape {tuple(has)}, not {tuple(needs)}")
    if wrong:
        raise CheckpointError(f"{file}: not the weights of its {CONFIG}: {files.one_line('; '.join(wrong))}")
    for name, tensor in wanted.items():
        tensor.copy_(found[name])
