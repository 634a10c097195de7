//! Adapters by name: which are loaded, and how a request's `model` finds them.

use crate::config::ServerConfig;
use crate::error::{ApiError, excerpt};
use crate::state::Service;
use hearth_engine::api::Adapter;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// Longest name.
const LONGEST_NAME: usize = 256;
/// Most adapters at once.
const MOST_ADAPTERS: usize = 256;
/// The files an adapter is read from.
const FILES: [&str; 3] = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"];

/// Adapters by name. Requests hold on to the adapter they began with, whatever happens to its name.
#[derive(Default)]
pub(crate) struct Adapters {
    by_name: RwLock<BTreeMap<String, Arc<Adapter>>>,
    /// One is loaded at a time.
    loading: Mutex<()>,
}

impl Adapters {
    pub(crate) fn new(adapters: &[(String, Arc<Adapter>)]) -> Self {
        Self { by_name: RwLock::new(adapters.iter().cloned().collect()), loading: Mutex::default() }
    }

    /// The adapter of this name.
    pub(crate) fn get(&self, name: &str) -> Option<Arc<Adapter>> {
        self.by_name.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// All names, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        self.by_name.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// Names of those that requests hold at the moment.
    pub(crate) fn in_use(&self) -> Vec<String> {
        let by_name = self.by_name.read().unwrap_or_else(PoisonError::into_inner);
        by_name.iter().filter(|(_, a)| Arc::strong_count(a) > 1).map(|(name, _)| name.clone()).collect()
    }

    /// Reads an adapter from the folder for adapters and gives it a name. Blocks.
    ///
    /// # Errors
    /// 403 when there is no such folder, 400 that names the field otherwise.
    pub(crate) fn load(
        &self,
        config: &ServerConfig,
        service: &Service,
        name: &str,
        path: &str,
        in_place: bool,
    ) -> Result<(), ApiError> {
        let folder = folder(config)?;
        check_adapter_name(config, name).map_err(|what| ApiError::field("lora_name", what))?;
        let _one_at_a_time = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if !in_place && self.get(name).is_some() {
            let message = format!(
                "an adapter {} is loaded already; unload it first, or replace it with \"load_inplace\": true",
                excerpt(name)
            );
            return Err(ApiError::field("lora_name", message));
        }
        if self.names().len() >= MOST_ADAPTERS && self.get(name).is_none() {
            let message =
                format!("{MOST_ADAPTERS} adapters are loaded, which is the limit; unload one first");
            return Err(ApiError::field("lora_name", message));
        }
        let found = find(folder, path).ok_or_else(|| {
            ApiError::field(
                "lora_path",
                format!("there is no adapter {} in the folder for adapters", excerpt(path)),
            )
        })?;
        let adapter = service.engine.load_adapter(&found).map_err(|error| {
            // The client's own words for the place, not the server's.
            let message = error.to_string().replace(&*found.to_string_lossy(), path);
            ApiError::field("lora_path", message)
        })?;
        let mut by_name = self.by_name.write().unwrap_or_else(PoisonError::into_inner);
        by_name.insert(name.to_owned(), adapter);
        Ok(())
    }

    /// Takes a name away. Its requests in flight go on.
    ///
    /// # Errors
    /// 403 when adapters are not the clients' to change, 404 for a name that is not there.
    pub(crate) fn unload(&self, config: &ServerConfig, name: &str) -> Result<(), ApiError> {
        folder(config)?;
        let mut by_name = self.by_name.write().unwrap_or_else(PoisonError::into_inner);
        match by_name.remove(name) {
            Some(_) => Ok(()),
            None => Err(ApiError::no_such_adapter(name)),
        }
    }
}

fn folder(config: &ServerConfig) -> Result<&Path, ApiError> {
    config.adapter_folder.as_deref().ok_or_else(|| {
        ApiError::forbidden("this server was not started with a folder from which adapters may be loaded")
    })
}

/// The adapter's directory, if it and its files lie in the folder once all links are followed.
fn find(folder: &Path, path: &str) -> Option<PathBuf> {
    let folder = folder.canonicalize().ok()?;
    // An absolute path takes the folder's place; then it must lead back into it.
    let found = folder.join(path).canonicalize().ok()?;
    let inside = |path: &Path| path.canonicalize().is_ok_and(|real| real.starts_with(&folder));
    let files = FILES.map(|file| found.join(file));
    let all_inside = files.iter().filter(|file| file.symlink_metadata().is_ok()).all(|file| inside(file));
    (found.is_dir() && found != folder && found.starts_with(&folder) && all_inside).then_some(found)
}

/// Whether an adapter may have this name on such a server.
///
/// # Errors
/// A sentence that says why not.
pub fn check_adapter_name(config: &ServerConfig, name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("an adapter's name must not be empty".into());
    }
    if name.len() > LONGEST_NAME || name.chars().any(char::is_control) {
        return Err(format!(
            "an adapter's name must have at most {LONGEST_NAME} bytes and no control characters; {} has not",
            excerpt(name)
        ));
    }
    if config.is_base(name) {
        return Err(format!("{} is the model's own name; give the adapter another", excerpt(name)));
    }
    Ok(())
}

/// What a request's `model` stands for.
pub(crate) struct Target {
    /// The name to answer under: the one asked for.
    pub(crate) name: String,
    pub(crate) adapter: Option<Arc<Adapter>>,
}

impl Target {
    /// The model itself, an adapter, or `model:adapter`.
    ///
    /// # Errors
    /// 404 for anything else.
    pub(crate) fn of(
        config: &ServerConfig,
        adapters: &Adapters,
        asked: Option<&str>,
    ) -> Result<Self, ApiError> {
        let Some(name) = asked else { return Ok(Self { name: config.model_id.clone(), adapter: None }) };
        if config.is_base(name) {
            return Ok(Self { name: name.to_owned(), adapter: None });
        }
        // Names may hold colons.
        let after_base = |(at, _): (usize, &str)| config.is_base(&name[..at]).then(|| &name[at + 1..]);
        let qualified = || name.match_indices(':').filter_map(after_base).find_map(|name| adapters.get(name));
        match adapters.get(name).or_else(qualified) {
            Some(adapter) => Ok(Self { name: name.to_owned(), adapter: Some(adapter) }),
            None => Err(ApiError::no_such_model(name, &config.model_id, &adapters.names())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_outside_the_folder_is_not_found() {
        let root = tempfile::tempdir().expect("a directory");
        let at = |path: &str| root.path().join(path);
        for dir in ["in/good", "in/deep/er", "in/linked", "out"] {
            std::fs::create_dir_all(at(dir)).expect("creates");
        }
        std::fs::write(at("secret"), "x").expect("writes");
        std::fs::write(at("in/file"), "x").expect("writes");
        std::os::unix::fs::symlink(at("out"), at("in/escape")).expect("links");
        std::os::unix::fs::symlink(at("in/good"), at("in/alias")).expect("links");
        std::os::unix::fs::symlink(at("secret"), at("in/linked/adapter_config.json")).expect("links");
        let found = |path: &str| find(&at("in"), path).is_some();
        assert!(["good", "./good", "deep/er", "deep/../good", "alias"].iter().all(|path| found(path)));
        assert!(found(&at("in/good").display().to_string()), "an absolute path into the folder");
        for path in ["", ".", "..", "../out", "escape", "linked", "file", "nothing", "/", "/etc", "a\0b"] {
            assert!(!found(path), "{path:?}");
        }
    }
}
