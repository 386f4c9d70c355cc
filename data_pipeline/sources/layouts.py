"""How datasets lie on disk. Each layout lists the samples of a split: their names, their labels, where their bytes are.

class_folders   ROOT/{train,val}/CLASS/**/IMAGE, or ROOT/CLASS/**/IMAGE divided by a hash
tables          a CSV or Parquet table of image names and labels, as Kaggle publishes them
webdataset      ROOT/{train,val}/*.tar in WebDataset layout: KEY.jpg beside KEY.cls

Images without labels are those anywhere below a folder, or those that a table names.
"""

from pathlib import Path

from data_pipeline.config import DataConfig, require
from data_pipeline.sources.class_folders import class_folders, folder_names, images_below
from data_pipeline.sources.listing import KINDS, UNLABELLED, Listing, share
from data_pipeline.sources.tables import completed, manifest, table_names
from data_pipeline.sources.webdataset import shard_classes, tar_shards


def list_samples(root: Path, cfg: DataConfig, split: str, classes: list[str] | None) -> Listing:
    """The samples of `split` ("train" or "val") in whichever layout `root` has. Raises `UserError`.

    Labels follow `classes`, or the classes of the training split.
    """
    if root.is_file():
        return manifest(root, cfg, split, classes)
    divided = (root / "train").is_dir() or (root / "val").is_dir()
    for half in ("train", split) if classes is None else (split,):
        require(
            not divided or (root / half).is_dir(),
            f"data.path: {root} has no {half}/ beside its other half; add it, or give a folder of CLASS/ folders only",
        )
    base, train = (root / split, root / "train") if divided else (root, root)
    if any(base.glob("*.tar")):
        listing = tar_shards(base, classes or shard_classes(train))
    else:
        listing = class_folders(base, classes or folder_names(train))
    return listing if divided else share(listing, cfg.val_share, split)


def list_images(root: Path, cfg: DataConfig) -> Listing:
    """All images below a folder in the order of their paths, or those that a table names in its order; UNLABELLED.

    Raises `UserError`.
    """
    if root.is_file():
        base, watched = Path(cfg.images) if cfg.images else root.parent, [root]
        paths = completed(base, table_names(root, cfg), root)
    else:
        base = root
        paths, watched = images_below(root, root)
    require(len(paths) > 0, f"data.path: no images in {root}; put {KINDS} files into it")
    return Listing(base, paths, [UNLABELLED] * len(paths), [], watched)
