//! The ranks of a run: threads of this process, or one per process that a launcher started.
//!
//! # Order
//! [`Start::join`] comes first: from then on every process of a launcher's world makes the same calls. What may go
//! wrong on one of them alone goes through [`Start::agree`] and [`Start::same`], then through [`World::run`]. An error
//! of any rank is an error of all; of a launcher's processes rank 0 says it, once, before any of them ends: launchers
//! end all processes as soon as one has failed, and a sentence not yet written would be lost.

use crate::exit::{self, Said, usage};
use crate::ui::Ui;
use hearth_collective::{Buffer, Diagnosis, Error, Ordered, ProcessGroup, Watchdog, mpi, threads};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// Bytes of a rank's stack, as much as a main thread has.
const STACK: usize = 8 << 20;

/// A command's ranks before it is known how many it wants.
pub struct Start {
    /// This process's rank in the world that a launcher made; `None` without a launcher.
    launched: Option<Box<dyn ProcessGroup>>,
}

impl Start {
    /// Joins the launcher's world, if a launcher started this process. In processes whose rank is not 0 `ui` falls
    /// silent.
    ///
    /// # Errors
    /// A launcher without its MPI library, ranks that do not know of each other or run other versions.
    pub fn join(ui: &Ui) -> anyhow::Result<Self> {
        let mut start = Self { launched: mpi::connect()? };
        if !start.speaks() {
            ui.hush();
        }
        start.same("version of hearth", env!("CARGO_PKG_VERSION"))?;
        Ok(start)
    }

    /// Ranks that the launcher started; `None` without a launcher.
    pub fn launched(&self) -> Option<usize> {
        self.launched.as_ref().map(|group| group.world_size())
    }

    /// Whether this process speaks for all.
    pub fn speaks(&self) -> bool {
        self.launched.as_ref().is_none_or(|group| group.rank() == 0)
    }

    /// The value that every rank came to by itself, or the error of any of them.
    ///
    /// # Errors
    /// Those of `result` on any rank.
    pub fn agree<T>(&mut self, result: anyhow::Result<T>) -> anyhow::Result<T> {
        let Some(group) = &mut self.launched else { return result };
        let outcome = result.as_ref().err().map(Failure::of);
        let all = gather(&mut **group, encode(&outcome))?;
        match verdict(&all) {
            None => result,
            Some(failure) => {
                failure.say_once(group.rank());
                group.barrier()?;
                Err(Said { code: failure.code }.into())
            }
        }
    }

    /// Refuses ranks whose `value` is not rank 0's.
    ///
    /// # Errors
    /// A sentence that names them and `what` differs.
    pub fn same(&mut self, what: &str, value: &str) -> anyhow::Result<()> {
        let Some(group) = &mut self.launched else { return Ok(()) };
        let all = gather(&mut **group, value.as_bytes().to_vec())?;
        let others: Vec<usize> = (0..all.len()).filter(|rank| all[*rank] != all[0]).collect();
        let verdict = if others.is_empty() { Ok(()) } else { Err(usage(differs(what, &others))) };
        self.agree(verdict)
    }

    /// The number of ranks of a run that asks for `wanted`: the launcher's, if there is one.
    ///
    /// # Errors
    /// When the launcher started another number of ranks than are wanted.
    pub fn world_size(&mut self, wanted: Option<usize>) -> anyhow::Result<usize> {
        let verdict = match (self.launched(), wanted) {
            (Some(launched), Some(wanted)) if launched != wanted => Err(usage(format!(
                "the launcher started {launched} ranks, [parallel] data is {wanted}; start {wanted}, or leave data out"
            ))),
            (launched, wanted) => Ok(launched.or(wanted).unwrap_or(1)),
        };
        self.agree(verdict)
    }

    /// How `world_size` ranks are spread over machines.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn spread(&mut self, world_size: usize) -> anyhow::Result<Spread> {
        let Some(group) = &mut self.launched else { return Ok(Spread { here: world_size, machines: 1 }) };
        let hosts = gather(&mut **group, host_name().into_bytes())?;
        let here = hosts.iter().filter(|host| **host == hosts[group.rank()]).count();
        let machines = (0..hosts.len()).filter(|i| !hosts[..*i].contains(&hosts[*i])).count();
        Ok(Spread { here, machines })
    }

    /// How long ranks wait for each other from now on.
    pub fn set_timeout(&mut self, timeout: Duration) {
        if let Some(group) = &mut self.launched {
            group.set_timeout(timeout);
        }
    }

    /// Connects `world_size` ranks; a call between them that lasts longer than `timeout` ends the process.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn open(self, world_size: usize, timeout: Duration) -> anyhow::Result<World> {
        let watchdog = Watchdog { timeout, on_timeout: Arc::new(give_up) };
        let start = |group| Ordered::start(group, watchdog.clone());
        let Some(group) = self.launched else {
            let ranks = threads::group(world_size).into_iter().map(|rank| start(Box::new(rank))).collect();
            return Ok(World { ranks, control: None });
        };
        let rank = start(group);
        let control = rank.split(0, rank.rank()).wait()?;
        Ok(World { ranks: vec![rank], control: Some(control) })
    }
}

/// How ranks are spread over machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spread {
    /// Ranks on this machine: they share its host memory and its disk.
    pub here: usize,
    /// Machines.
    pub machines: usize,
}

/// Connected ranks.
pub struct World {
    /// Those that live in this process.
    ranks: Vec<Ordered>,
    /// Of a launcher's world: over which its processes tell each other how they fared.
    control: Option<Ordered>,
}

impl World {
    /// Runs what `make` makes as each rank, and returns rank 0's result where rank 0 lives. `make` is called once per
    /// rank of this process and dropped before the work begins. A rank that fails leaves its group, which the others
    /// are told.
    ///
    /// # Errors
    /// The error of the rank that failed first, not of those that lost it.
    ///
    /// # Panics
    /// As the work.
    pub fn run<T: Send, W>(self, mut make: impl FnMut() -> W) -> anyhow::Result<Option<T>>
    where
        W: FnOnce(Ordered) -> anyhow::Result<T> + Send,
    {
        let work: Vec<(Ordered, W)> = self.ranks.into_iter().map(|rank| (rank, make())).collect();
        drop(make);
        let Some(control) = self.control else { return as_threads(work).map(Some) };
        let mut results = work.into_iter().map(|(rank, work)| work(rank));
        as_process(control, results.next().expect("a launched process is one rank"))
    }
}

/// Each rank on a thread of its own; a single one needs none.
fn as_threads<T: Send, W>(mut work: Vec<(Ordered, W)>) -> anyhow::Result<T>
where
    W: FnOnce(Ordered) -> anyhow::Result<T> + Send,
{
    if let [_] = work[..] {
        let (rank, work) = work.remove(0);
        return work(rank);
    }
    let ended: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = work
            .into_iter()
            .map(|(rank, work)| {
                let thread =
                    std::thread::Builder::new().name(format!("rank {}", rank.rank())).stack_size(STACK);
                thread.spawn_scoped(scope, move || work(rank)).expect("a thread for a rank")
            })
            .collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    let results = ended.into_iter().map(|end| end.unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
    first_cause(results.collect())
}

/// Rank 0's result, or the error that the others followed from.
fn first_cause<T>(results: Vec<anyhow::Result<T>>) -> anyhow::Result<T> {
    let failures: Vec<Option<Failure>> =
        results.iter().map(|result| result.as_ref().err().map(Failure::of)).collect();
    let Some((rank, alone)) = cause(&failures) else {
        return results.into_iter().next().expect("at least one rank");
    };
    let error = results.into_iter().nth(rank).and_then(Result::err).expect("it failed");
    Err(if alone { error.context(format!("rank {rank}")) } else { error })
}

fn as_process<T>(control: Ordered, result: anyhow::Result<T>) -> anyhow::Result<Option<T>> {
    let outcome = result.as_ref().err().map(Failure::of);
    let all = match control.all_gather_varied(encode(&outcome)).wait() {
        Ok(all) => all,
        // Who is left has to speak for itself.
        Err(lost) => return result.and(Err(lost.into())),
    };
    match verdict(&all) {
        None => Ok(result.ok().filter(|_| control.rank() == 0)),
        Some(failure) => {
            failure.say_once(control.rank());
            control.barrier().wait()?;
            Err(Said { code: failure.code }.into())
        }
    }
}

/// What a rank tells the others of its error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Failure {
    code: u8,
    sentence: String,
    /// It only lost another rank.
    consequence: bool,
}

impl Failure {
    fn of(error: &anyhow::Error) -> Self {
        Self { code: exit::code(error), sentence: exit::sentence(error), consequence: is_consequence(error) }
    }

    fn say_once(&self, rank: usize) {
        if rank == 0 {
            exit::say(&self.sentence);
        }
    }
}

fn is_consequence(error: &anyhow::Error) -> bool {
    let lost = |e: &Error| matches!(e, Error::PeerLeft { .. } | Error::Aborted { .. } | Error::Stopped);
    error.chain().any(|cause| match cause.downcast_ref() {
        Some(hearth_train::Error::OtherRank { .. }) => true,
        Some(hearth_train::Error::Collective(e)) => lost(e),
        _ => cause.downcast_ref().is_some_and(lost),
    })
}

/// The rank whose error the others followed from, and whether to name it: not rank 0, nor where all say the same.
fn cause(failures: &[Option<Failure>]) -> Option<(usize, bool)> {
    let own = |failure: &Option<Failure>| failure.as_ref().is_some_and(|f| !f.consequence);
    let rank = failures.iter().position(own).or_else(|| failures.iter().position(Option::is_some))?;
    let alone = rank > 0 && failures.iter().any(|failure| *failure != failures[rank]);
    Some((rank, alone))
}

fn verdict(outcomes: &[Vec<u8>]) -> Option<Failure> {
    let failures: Vec<Option<Failure>> = outcomes.iter().map(|outcome| decode(outcome)).collect();
    let (rank, alone) = cause(&failures)?;
    let mut failure = failures.into_iter().nth(rank).flatten()?;
    if alone {
        failure.sentence = format!("rank {rank}: {}", failure.sentence);
    }
    Some(failure)
}

fn encode(outcome: &Option<Failure>) -> Vec<u8> {
    serde_json::to_vec(outcome).expect("plain values serialise")
}

fn decode(outcome: &[u8]) -> Option<Failure> {
    serde_json::from_slice(outcome).expect("every rank runs the same program")
}

fn differs(what: &str, others: &[usize]) -> String {
    let names: Vec<String> = others.iter().map(usize::to_string).collect();
    let (ranks, have) = if let [_] = others { ("rank", "has") } else { ("ranks", "have") };
    format!("{ranks} {} {have} another {what} than rank 0; start every rank with the same", names.join(", "))
}

/// The bytes of all ranks, by rank.
fn gather(group: &mut dyn ProcessGroup, mut bytes: Vec<u8>) -> Result<Vec<Vec<u8>>, Error> {
    let world_size = group.world_size();
    let (own, all) = (vec![bytes.len() as u64], vec![0u64; world_size]);
    let lengths = group.all_gather(Box::new(own), Box::new(all))?;
    let length = |part: &[u8]| u64::from_ne_bytes(part.try_into().expect("eight bytes")) as usize;
    let lengths: Vec<usize> = lengths.bytes().chunks_exact(8).map(length).collect();
    let longest = lengths.iter().copied().max().unwrap_or(0);
    bytes.resize(longest, 0);
    let all: Box<dyn Buffer> =
        group.all_gather(Box::new(bytes), Box::new(vec![0u8; longest * world_size]))?;
    Ok((0..world_size).map(|rank| all.bytes()[rank * longest..][..lengths[rank]].to_vec()).collect())
}

/// Says what was waited for and ends the process: a rank that waits for nothing would go on for ever.
fn give_up(diagnosis: &Diagnosis) {
    exit::say(&diagnosis.to_string());
    hearth_collective::watchdog::give_up()
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    fn lost() -> anyhow::Error {
        let operation = hearth_collective::Operation::Barrier;
        hearth_train::Error::Collective(Error::PeerLeft { rank: 1, operation }).into()
    }

    #[test]
    fn the_error_of_the_rank_that_failed_is_told_not_of_those_that_lost_it() {
        let error =
            first_cause::<()>(vec![Err(lost()), Err(anyhow!("no room")), Err(lost())]).expect_err("one");
        assert_eq!(exit::sentence(&error), "rank 1: no room");
        let error =
            first_cause::<()>(vec![Err(anyhow!("no room")), Err(anyhow!("no room"))]).expect_err("both");
        assert_eq!(exit::sentence(&error), "no room");
    }

    #[test]
    fn a_rank_that_fails_ends_the_others() {
        let world = Start { launched: None }.open(3, Duration::from_secs(60)).expect("threads");
        let make = || {
            |comm: Ordered| match comm.rank() {
                1 => Err(usage("rank 1 cannot")),
                _ => Ok(comm.barrier().wait()?),
            }
        };
        let error = world.run(make).expect_err("rank 1 failed");
        assert_eq!((exit::code(&error), exit::sentence(&error).as_str()), (2, "rank 1: rank 1 cannot"));
    }

    #[test]
    fn ranks_that_differ_are_named() {
        assert!(differs("recipe", &[1, 3]).starts_with("ranks 1, 3 have another recipe than rank 0"));
        assert!(differs("model", &[2]).starts_with("rank 2 has another model"));
    }
}
