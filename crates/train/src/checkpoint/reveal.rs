//! Giving a complete directory its name, and taking names away again.

use super::manifest::Manifest;
use super::{Checkpoint, Files, load, replaced_path, step_path};
use crate::Error;
use std::io;
use std::path::Path;

/// Renames `partial`, which holds `manifest` and everything it lists, to its name in `dir`.
pub(super) fn reveal(files: &dyn Files, dir: &Path, partial: &Path, manifest: &Manifest) -> io::Result<()> {
    let step = manifest.progress.step;
    let (path, replaced) = (step_path(dir, step), replaced_path(dir, step));
    if Checkpoint::open(&path).is_ok_and(|there| there.manifest.is_same_state(manifest)) {
        // Saved before; replacing it would be the only moment at which it could be lost.
        return files.remove_dir(partial);
    }
    // A damaged checkpoint, or one with other settings. Until the new one has its name it is found under this one.
    let in_the_way = path.exists();
    if in_the_way {
        if replaced.exists() {
            files.remove_dir(&replaced)?;
        }
        files.rename(&path, &replaced)?;
    }
    let renamed = files.rename(partial, &path);
    if renamed.is_err() && in_the_way {
        // Best effort: it can be read under its present name too.
        let _ = files.rename(&replaced, &path);
    }
    renamed?;
    files.sync(dir)?;
    if in_the_way {
        // The new one is there; `sweep` removes what is left of the old one.
        let _ = files.remove_dir(&replaced);
    }
    Ok(())
}

/// Removes what saves that were killed left behind in `dir`, and gives a checkpoint that was to be replaced its name
/// back if its successor never got it.
///
/// # Errors
/// [`Error::Io`].
pub fn sweep(files: &dyn Files, dir: &Path) -> Result<(), Error> {
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let Some((step, state)) = name.strip_prefix(".step-").and_then(|rest| rest.split_once('.')) else {
            continue;
        };
        let named = dir.join(format!("step-{step}"));
        match state {
            "replaced" if !named.exists() => files.rename(&path, &named).map_err(Error::io(&path))?,
            "replaced" | "partial" => files.remove_dir(&path).map_err(Error::io(&path))?,
            _ => {}
        }
    }
    Ok(())
}

/// Removes old checkpoints so that the newest `keep` (0 = all) remain, and in any case the newest that verifies: when
/// newer ones are damaged it stays too, and when none verifies nothing is removed.
///
/// # Errors
/// [`Error::Io`].
pub fn prune(files: &dyn Files, dir: &Path, keep: usize) -> Result<(), Error> {
    let paths = load::steps(dir)?;
    if keep == 0 || paths.len() <= keep {
        return Ok(());
    }
    let Some(verified) = paths.iter().position(|(_, path)| Checkpoint::open(path).is_ok()) else {
        return Ok(());
    };
    for (_, path) in paths.into_iter().skip(keep.max(verified + 1)) {
        files.remove_dir(&path).map_err(Error::io(&path))?;
    }
    Ok(())
}
