//! Compiled kernels in the user's cache, by what they were made from: a card's first use pays for compiling, no other does.

use crate::nvrtc::{Compiled, Error, Nvrtc, OPTIONS};
use crate::sources::{HEADERS, Source};
use sha2::{Digest, Sha256};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A folder of compiled kernels.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// `hearth/cubins` in `XDG_CACHE_HOME` or `~/.cache`; `None` where neither is known.
    pub fn of_user() -> Option<Self> {
        let named = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let cache = named("XDG_CACHE_HOME").or_else(|| Some(named("HOME")?.join(".cache")))?;
        Some(Self::at(&cache.join("hearth/cubins")))
    }

    /// This folder, made when first written to.
    pub fn at(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// What [`Nvrtc::compile`] gives, from the cache where it is there. A cache that cannot be written to costs time and
    /// nothing else.
    ///
    /// # Errors
    /// As [`Nvrtc::compile`].
    pub fn compile(&self, nvrtc: &Nvrtc, source: &Source, arch: &str) -> Result<Compiled, Error> {
        let name = key(source, arch, nvrtc.version()?);
        if let Some(found) = self.read(&name) {
            return Ok(found);
        }
        let compiled = nvrtc.compile(source, arch)?;
        let _ = self.write(&name, &compiled);
        Ok(compiled)
    }

    fn read(&self, name: &str) -> Option<Compiled> {
        let log = fs::read_to_string(self.folder.join(name).with_extension("log")).ok()?;
        let cubin = fs::read(self.folder.join(name).with_extension("cubin")).ok()?;
        let whole = cubin.starts_with(b"\x7fELF") || (cubin.starts_with(b"//") && cubin.ends_with(b"\0"));
        whole.then_some(Compiled { cubin, log })
    }

    /// The image last: with it the entry is complete.
    fn write(&self, name: &str, compiled: &Compiled) -> io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        for (extension, bytes) in [("log", compiled.log.as_bytes()), ("cubin", &compiled.cubin)] {
            let fresh = self.folder.join(format!(".{name}.{extension}.{}", std::process::id()));
            fs::write(&fresh, bytes)?;
            fs::rename(&fresh, self.folder.join(name).with_extension(extension))?;
        }
        Ok(())
    }
}

/// A name for everything the code depends on.
fn key(source: &Source, arch: &str, version: (i32, i32)) -> String {
    let mut hash = Sha256::new();
    let mut add = |text: &str| {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    };
    for part in HEADERS.iter().chain([source]) {
        add(part.name);
        add(part.text);
    }
    OPTIONS.iter().for_each(|option| add(option));
    add(arch);
    add(&format!("NVRTC {}.{}", version.0, version.1));
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sources::SOURCES;
    use std::collections::BTreeSet;

    #[test]
    fn a_key_depends_on_source_architecture_and_compiler() {
        let mut keys = BTreeSet::new();
        for source in SOURCES {
            for arch in crate::ARCHITECTURES {
                for version in [(12, 8), (12, 9)] {
                    assert!(keys.insert(key(source, arch, version)), "{source:?} {arch} {version:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_written_is_read_and_what_is_damaged_is_not() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let cache = Cache::at(&folder.path().join("new"));
        let compiled = Compiled { cubin: b"\x7fELF and more".to_vec(), log: "a log".to_owned() };
        assert_eq!(cache.read("name"), None);
        cache.write("name", &compiled).expect("written");
        assert_eq!(cache.read("name"), Some(compiled));
        fs::write(folder.path().join("new/name.cubin"), b"nothing").expect("written");
        assert_eq!(cache.read("name"), None);
    }
}
