//! Who started this process, and which library it talks through.

use std::env;

use super::ffi::Library;
use crate::Error;

/// A launcher that started this process as one of several ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// How the user knows it.
    pub launcher: &'static str,
    /// How many ranks it started, if it says.
    pub world_size: Option<usize>,
    family: Family,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    OpenMpi,
    Mpich,
    /// Either can speak PMIx.
    Either,
    /// Nobody tells the ranks of each other.
    Nobody,
}

/// The launcher of this process; None if a person or a script started it.
pub fn launched() -> Option<Launch> {
    launch(|name| env::var(name).ok())
}

fn launch(variable: impl Fn(&str) -> Option<String>) -> Option<Launch> {
    let number = |name| variable(name).and_then(|value| value.parse().ok());
    let tasks = number("SLURM_STEP_NUM_TASKS");
    let found = |launcher, world_size, family| Some(Launch { launcher, world_size, family });
    if let Some(size) = number("OMPI_COMM_WORLD_SIZE") {
        return found("mpirun (Open MPI)", Some(size), Family::OpenMpi);
    }
    if let Some(size) = number("PMI_SIZE") {
        return found("mpiexec (MPICH)", Some(size), Family::Mpich);
    }
    if variable("PMIX_RANK").is_some() {
        return found(if tasks.is_some() { "srun" } else { "a PMIx launcher" }, tasks, Family::Either);
    }
    tasks.filter(|tasks| *tasks > 1).and_then(|tasks| found("srun", Some(tasks), Family::Nobody))
}

impl Launch {
    /// Loads the library and joins the world that the launcher made.
    pub(super) fn join(&self) -> Result<Library, Error> {
        if self.family == Family::Nobody {
            return Err(self.not_connected(1, "none was loaded".into()));
        }
        let library = self.load()?;
        match self.world_size {
            Some(expected) if expected != library.world_size => {
                Err(self.not_connected(library.world_size, library.version.clone()))
            }
            _ => Ok(library),
        }
    }

    fn load(&self) -> Result<Library, Error> {
        let candidates = self.candidates();
        let library = candidates.iter().find_map(|name| Library::open(name));
        library.unwrap_or_else(|| {
            Err(Error::NoLibrary { launcher: self.launcher, tried: candidates.join(", ") })
        })
    }

    /// File names, the likeliest first.
    fn candidates(&self) -> Vec<String> {
        if let Ok(name) = env::var("HEARTH_MPI_LIBRARY") {
            return vec![name];
        }
        let (open_mpi, mpich) = (["libmpi.so.40", "libmpi.so"], ["libmpich.so.12", "libmpi.so.12"]);
        let names = match self.family {
            Family::Mpich => [mpich, open_mpi],
            _ => [open_mpi, mpich],
        };
        names.concat().into_iter().map(str::to_owned).collect()
    }

    fn not_connected(&self, found: usize, library: String) -> Error {
        let expected = self.world_size.unwrap_or(0);
        Error::NotConnected { launcher: self.launcher, expected, found, library }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch_with(variables: &[(&str, &str)]) -> Option<Launch> {
        launch(|name| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn launchers_are_told_apart_by_their_variables() {
        let seen =
            |variables| launch_with(variables).map(|found| (found.launcher, found.world_size, found.family));
        assert_eq!(seen(&[]), None);
        let open_mpi = [("OMPI_COMM_WORLD_SIZE", "4"), ("PMIX_RANK", "0"), ("SLURM_STEP_NUM_TASKS", "2")];
        assert_eq!(seen(&open_mpi), Some(("mpirun (Open MPI)", Some(4), Family::OpenMpi)));
        assert_eq!(seen(&[("PMI_SIZE", "3")]), Some(("mpiexec (MPICH)", Some(3), Family::Mpich)));
        let pmix = [("PMIX_RANK", "1"), ("SLURM_STEP_NUM_TASKS", "2")];
        assert_eq!(seen(&pmix), Some(("srun", Some(2), Family::Either)));
        assert_eq!(seen(&[("SLURM_STEP_NUM_TASKS", "1")]), None);
    }

    #[test]
    fn tasks_of_a_plain_srun_are_refused_before_any_library_is_loaded() {
        let launch = launch_with(&[("SLURM_STEP_NUM_TASKS", "2")]).expect("a launcher");
        let error = launch.join().err().expect("refused").to_string();
        assert!(error.starts_with("srun started 2 tasks, but each is alone"), "{error}");
    }
}
