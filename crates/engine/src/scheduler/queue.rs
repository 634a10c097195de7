//! Who is admitted next: by priority, then the client served least, and nobody overtaken for ever.

use super::{Arrival, RequestId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Counters kept of clients that ask for nothing at the moment.
const IDLE_CLIENTS: usize = 4096;

#[derive(Clone, Debug)]
struct Waiting {
    arrival: Arrival,
    /// Younger requests admitted while this one was the first of its line.
    overtaken: usize,
}

/// Requests that never ran. A line is what one client asks for with one priority: within it, first come, first
/// served. Only the first of each line competes.
#[derive(Clone, Debug)]
pub(super) struct Queue {
    /// In order of arrival.
    waiting: Vec<Waiting>,
    /// Tokens computed for each client that was served lately.
    served: BTreeMap<Arc<str>, u64>,
    max_overtaken: usize,
}

impl Queue {
    pub fn new(max_overtaken: usize) -> Self {
        Self { waiting: Vec::new(), served: BTreeMap::new(), max_overtaken }
    }

    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    pub fn contains(&self, id: RequestId) -> bool {
        self.waiting.iter().any(|w| w.arrival.id == id)
    }

    /// Puts a request at the end. `active` are the clients with sequences under way: one that comes back after a
    /// pause is put level with the least served of those here, so that idle time cannot be saved up (the counters of
    /// Sheng et al., "Fairness in Serving Large Language Models", 2024).
    pub fn push(&mut self, arrival: Arrival, active: &BTreeSet<Arc<str>>) {
        let here: BTreeSet<&Arc<str>> =
            active.iter().chain(self.waiting.iter().map(|w| &w.arrival.client)).collect();
        if !here.contains(&arrival.client) {
            let least = here.iter().filter_map(|c| self.served.get(*c)).min().copied().unwrap_or(0);
            if self.served.len() >= IDLE_CLIENTS + here.len() {
                let here: BTreeSet<Arc<str>> = here.into_iter().cloned().collect();
                self.served.retain(|client, _| here.contains(client));
            }
            let served = self.served.entry(arrival.client.clone()).or_default();
            *served = least.max(*served);
        }
        self.waiting.push(Waiting { arrival, overtaken: 0 });
    }

    /// A client had tokens computed.
    pub fn charge(&mut self, client: &Arc<str>, tokens: usize) {
        *self.served.entry(client.clone()).or_default() += tokens as u64;
    }

    /// Places of the first of each line, in order of arrival.
    fn heads(&self) -> Vec<usize> {
        let mut lines = BTreeSet::new();
        let first = |i: &usize| {
            let a = &self.waiting[*i].arrival;
            lines.insert((a.priority, &a.client))
        };
        (0..self.waiting.len()).filter(first).collect()
    }

    fn choose(&self) -> Option<usize> {
        let heads = self.heads();
        let overdue = heads.iter().find(|i| self.waiting[**i].overtaken >= self.max_overtaken);
        let rank = |i: &usize| {
            let a = &self.waiting[*i].arrival;
            (-i64::from(a.priority), self.served.get(&a.client).copied().unwrap_or(0), *i)
        };
        overdue.copied().or_else(|| heads.into_iter().min_by_key(rank))
    }

    /// Whose turn it is.
    pub fn next(&self) -> Option<&Arrival> {
        self.choose().map(|i| &self.waiting[i].arrival)
    }

    /// Takes that one out.
    pub fn pop(&mut self) -> Option<Arrival> {
        let chosen = self.choose()?;
        for i in self.heads().into_iter().filter(|i| *i < chosen) {
            self.waiting[i].overtaken += 1;
        }
        Some(self.waiting.remove(chosen).arrival)
    }

    /// Takes a request out, if it is here.
    pub fn remove(&mut self, id: RequestId) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|w| w.arrival.id != id);
        self.waiting.len() < before
    }

    /// Who waits, how often overtaken, and what clients were served: what a walk over states tells apart.
    #[cfg(test)]
    pub fn shape(&self) -> String {
        let waiting: Vec<_> = self.waiting.iter().map(|w| (w.arrival.id, w.overtaken)).collect();
        format!("{waiting:?} {:?}", self.served)
    }

    /// Nobody asks for anything: everyone starts anew.
    pub fn forget(&mut self) {
        self.served.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrival(id: RequestId, client: &str, priority: i32) -> Arrival {
        Arrival { client: client.into(), priority, ..Arrival::new(id, vec![1], 1) }
    }

    fn queue(max_overtaken: usize, arrivals: &[(&str, i32)]) -> Queue {
        let mut queue = Queue::new(max_overtaken);
        for (id, (client, priority)) in arrivals.iter().enumerate() {
            queue.push(arrival(id as RequestId, client, *priority), &BTreeSet::new());
        }
        queue
    }

    /// The order they leave in, each costing its client ten tokens.
    fn order(mut queue: Queue) -> Vec<RequestId> {
        std::iter::from_fn(|| {
            let next = queue.pop()?;
            queue.charge(&next.client, 10);
            Some(next.id)
        })
        .collect()
    }

    #[test]
    fn one_client_is_served_in_order_of_arrival() {
        assert_eq!(order(queue(9, &[("a", 0), ("a", 0), ("a", 0)])), [0, 1, 2]);
    }

    #[test]
    fn clients_take_turns_however_many_requests_one_sends() {
        assert_eq!(
            order(queue(9, &[("a", 0), ("a", 0), ("a", 0), ("b", 0), ("b", 0), ("c", 0)])),
            [0, 3, 5, 1, 4, 2]
        );
    }

    #[test]
    fn a_higher_priority_goes_first() {
        assert_eq!(order(queue(9, &[("a", 0), ("a", 5), ("b", -1), ("b", 5)])), [1, 3, 0, 2]);
    }

    #[test]
    fn nobody_is_overtaken_more_often_than_the_limit() {
        let mut queue = queue(3, &[("poor", -1)]);
        for id in 1..4 {
            queue.push(arrival(id, "rich", 9), &BTreeSet::new());
            assert_eq!(queue.pop().map(|a| a.id), Some(id));
        }
        queue.push(arrival(4, "rich", 9), &BTreeSet::new());
        assert_eq!(order(queue), [0, 4]);
    }

    #[test]
    fn a_client_that_comes_back_has_saved_nothing_up() {
        let mut queue = queue(9, &[("a", 0), ("a", 0), ("a", 0), ("a", 0)]);
        for _ in 0..2 {
            let next = queue.pop().expect("there are four");
            queue.charge(&next.client, 10);
        }
        let active = BTreeSet::from(["a".into()]);
        for id in [10, 11, 12] {
            queue.push(arrival(id, "b", 0), &active);
        }
        assert_eq!(order(queue), [2, 10, 3, 11, 12]);
    }
}
