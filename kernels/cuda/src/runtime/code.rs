//! Kernels by name: compiled for the card, loaded when first used, kept.

use super::Error;
use super::ffi::{Context, Function, Module};
use crate::cache::Cache;
use crate::nvrtc::{Compiled, Nvrtc};
use crate::sources::SOURCES;
use crate::{ARCHITECTURES, nvrtc};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// The card's code.
pub(super) struct Code {
    capability: (i32, i32),
    nvrtc: Option<PathBuf>,
    cache: Option<Cache>,
    functions: RwLock<HashMap<String, Arc<Function>>>,
    files: Mutex<Files>,
}

#[derive(Default)]
struct Files {
    /// Opened when first needed.
    compiler: Option<Nvrtc>,
    modules: HashMap<&'static str, Arc<Module>>,
}

impl Code {
    pub fn new(capability: (i32, i32), nvrtc: Option<PathBuf>, cache: Option<Cache>) -> Self {
        Self { capability, nvrtc, cache, functions: RwLock::default(), files: Mutex::default() }
    }

    /// The kernel `name` of `file`.
    pub fn function(
        &self,
        context: &Arc<Context>,
        file: &'static str,
        name: &str,
    ) -> Result<Arc<Function>, Error> {
        if let Some(known) = self.functions.read().unwrap_or_else(PoisonError::into_inner).get(name) {
            return Ok(known.clone());
        }
        let function = Arc::new(Function::new(&self.module(context, file)?, name)?);
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        Ok(functions.entry(name.to_owned()).or_insert(function).clone())
    }

    fn module(&self, context: &Arc<Context>, file: &'static str) -> Result<Arc<Module>, Error> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = files.modules.get(file) {
            return Ok(loaded.clone());
        }
        if files.compiler.is_none() {
            files.compiler = Some(match &self.nvrtc {
                Some(path) => Nvrtc::open_at(path)?,
                None => Nvrtc::open()?,
            });
        }
        let compiler = files.compiler.as_ref().expect("it was just opened");
        let module = Arc::new(self.load(context, compiler, file)?);
        files.modules.insert(file, module.clone());
        Ok(module)
    }

    /// The first image that the driver takes.
    fn load(&self, context: &Arc<Context>, nvrtc: &Nvrtc, file: &'static str) -> Result<Module, Error> {
        let mut why = Vec::new();
        for target in targets(self.capability, &nvrtc.architectures()?) {
            let image = self.compile(nvrtc, file, &target)?;
            match Module::new(context, &image.cubin) {
                Ok(module) => return Ok(module),
                Err(Error::Call { code, text, .. }) => {
                    why.push(format!("the driver refuses {target} with code {code} ({text})"));
                }
                Err(other) => return Err(other),
            }
        }
        let (major, minor) = self.capability;
        if why.is_empty() {
            why.push("NVRTC makes code for newer cards only".to_owned());
        }
        Err(Error::NoCode { file, major, minor, why: why.join("; ") })
    }

    fn compile(&self, nvrtc: &Nvrtc, file: &'static str, target: &str) -> Result<Compiled, nvrtc::Error> {
        let source =
            SOURCES.iter().find(|source| source.name == file).expect("every launch names a file of ours");
        match &self.cache {
            Some(cache) => cache.compile(nvrtc, source, target),
            None => nvrtc.compile(source, target),
        }
    }
}

/// What to compile for, best first: an image for exactly this card, an image for an older one of the same major version,
/// which it runs too, and PTX, which its driver compiles.
fn targets((major, minor): (i32, i32), known: &[i32]) -> Vec<String> {
    let own = 10 * major + minor;
    let name = |number: i32| {
        let exact = format!("sm_{number}");
        let special = format!("{exact}a");
        if number == own && ARCHITECTURES.contains(&&*special) { special } else { exact }
    };
    let best = known.iter().copied().filter(|&n| n <= own).max();
    let image = best.filter(|n| n / 10 == major).map(name);
    image.into_iter().chain(best.map(|n| format!("compute_{n}"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_gets_its_own_image_an_older_one_or_ptx() {
        let known = [75, 80, 86, 89, 90, 100];
        assert_eq!(targets((9, 0), &known), ["sm_90a", "compute_90"]);
        assert_eq!(targets((8, 6), &known), ["sm_86", "compute_86"]);
        assert_eq!(targets((8, 7), &known), ["sm_86", "compute_86"], "same major version");
        assert_eq!(targets((10, 3), &known), ["sm_100", "compute_100"]);
        assert_eq!(targets((12, 0), &known), ["compute_100"], "newer than the compiler");
        assert!(targets((8, 0), &[90]).is_empty());
    }
}
