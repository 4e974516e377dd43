//! Improving a plan: moves and swaps until none helps, then exhaustive search within a budget.
//!
//! Configurations stay; only machines change. So private memory stays too, and what is minimised
//! is the bytes of tensors.

use carlsbad_types::ByteSize;

use super::machine::{Machine, Problem};
use super::{Draft, Instance, Node};

/// Passes over all instances. Each pass that changes anything holds fewer bytes than before, and
/// the first few find nearly all there is.
const PASSES: usize = 8;
/// Instances of which all pairs are tried as swaps; with more, a pass would take seconds.
const SWAPPED: usize = 400;
/// Instances up to which exhaustive search is tried; beyond, its budget would not get far.
const SEARCHED: usize = 20;
/// Partial plans looked at: some tens of milliseconds.
const BUDGET: u32 = 100_000;

/// A plan that holds no more bytes than `draft`.
pub(super) fn improve(problem: &Problem, nodes: &[Node], mut draft: Draft) -> Draft {
    let mut machines = draft.machines(problem, nodes.len());
    for _ in 0..PASSES {
        let moved = move_all(problem, nodes, &mut machines, &mut draft.0);
        let swapped =
            draft.0.len() <= SWAPPED && swap_all(problem, nodes, &mut machines, &mut draft.0);
        if !moved && !swapped {
            break;
        }
    }
    if draft.0.len() > SEARCHED {
        return draft;
    }
    let held = tensor_bytes(&machines);
    // Instances of one function and configuration are interchangeable: side by side, so that the
    // search can put them in one order only.
    draft.0.sort_by(|a, b| {
        let size = |i: &Instance| Machine::empty(problem).missing(problem, i.function);
        size(b)
            .cmp(&size(a))
            .then(a.function.cmp(&b.function))
            .then(b.row.cpus.total_cmp(&a.row.cpus))
            .then(a.rps.total_cmp(&b.rps))
    });
    let mut search = Exhaustive {
        problem,
        nodes,
        machines: vec![Machine::empty(problem); nodes.len()],
        chosen: Vec::with_capacity(draft.0.len()),
        best: None,
        least: held,
        budget: BUDGET,
    };
    search.place_from(0, ByteSize::ZERO, &draft.0);
    if let Some(best) = search.best {
        for (instance, node) in draft.0.iter_mut().zip(best) {
            instance.node = node;
        }
    }
    draft
}

fn tensor_bytes(machines: &[Machine]) -> ByteSize {
    machines.iter().map(Machine::tensor_bytes).sum()
}

/// Moves each instance to where it brings the fewest new bytes; whether anything was gained.
fn move_all(
    problem: &Problem,
    nodes: &[Node],
    machines: &mut [Machine],
    instances: &mut [Instance],
) -> bool {
    let mut gained = false;
    for instance in instances {
        let (function, row, from) = (instance.function, instance.row, instance.node);
        let freed = machines[from].freed_without(problem, function);
        let to = (0..nodes.len())
            .filter(|&to| to != from)
            .filter(|&to| machines[to].missing(problem, function) < freed)
            .filter(|&to| machines[to].fits(problem, &nodes[to], function, &row))
            .min_by_key(|&to| machines[to].missing(problem, function));
        if let Some(to) = to {
            machines[from].remove(problem, function, &row);
            machines[to].add(problem, function, &row);
            instance.node = to;
            gained = true;
        }
    }
    gained
}

/// Swaps the machines of two instances wherever that frees bytes; whether anything was gained.
fn swap_all(
    problem: &Problem,
    nodes: &[Node],
    machines: &mut [Machine],
    instances: &mut [Instance],
) -> bool {
    let mut gained = false;
    for a in 0..instances.len() {
        for b in a + 1..instances.len() {
            let (one, other) = (instances[a], instances[b]);
            if one.node == other.node || one.function == other.function {
                continue;
            }
            let before = machines[one.node].tensor_bytes() + machines[other.node].tensor_bytes();
            machines[one.node].remove(problem, one.function, &one.row);
            machines[other.node].remove(problem, other.function, &other.row);
            let fit =
                machines[one.node].fits(problem, &nodes[one.node], other.function, &other.row)
                    && machines[other.node].fits(
                        problem,
                        &nodes[other.node],
                        one.function,
                        &one.row,
                    );
            if fit {
                machines[one.node].add(problem, other.function, &other.row);
                machines[other.node].add(problem, one.function, &one.row);
                let after = machines[one.node].tensor_bytes() + machines[other.node].tensor_bytes();
                if after < before {
                    instances[a].node = other.node;
                    instances[b].node = one.node;
                    gained = true;
                    continue;
                }
                machines[one.node].remove(problem, other.function, &other.row);
                machines[other.node].remove(problem, one.function, &one.row);
            }
            machines[one.node].add(problem, one.function, &one.row);
            machines[other.node].add(problem, other.function, &other.row);
        }
    }
    gained
}

/// Branch and bound, depth first.
struct Exhaustive<'a> {
    problem: &'a Problem,
    nodes: &'a [Node],
    machines: Vec<Machine>,
    chosen: Vec<usize>,
    best: Option<Vec<usize>>,
    least: ByteSize,
    budget: u32,
}

impl Exhaustive<'_> {
    fn place_from(&mut self, at: usize, held: ByteSize, instances: &[Instance]) {
        // Bytes held only grow with further instances.
        if held >= self.least || self.budget == 0 {
            return;
        }
        self.budget -= 1;
        let Some(instance) = instances.get(at) else {
            self.least = held;
            self.best = Some(self.chosen.clone());
            return;
        };
        let (function, row) = (instance.function, instance.row);
        let same = at
            .checked_sub(1)
            .map(|before| &instances[before])
            .filter(|before| before.function == function && before.row == row);
        let first = match same {
            Some(_) => self.chosen.last().copied().unwrap_or(0),
            None => 0,
        };
        let mut order: Vec<usize> = (first..self.nodes.len()).collect();
        order.sort_by_key(|&node| self.machines[node].missing(self.problem, function));
        for node in order {
            if self.is_like_an_earlier_one(node, first) {
                continue;
            }
            if !self.machines[node].fits(self.problem, &self.nodes[node], function, &row) {
                continue;
            }
            let new = self.machines[node].missing(self.problem, function);
            self.machines[node].add(self.problem, function, &row);
            self.chosen.push(node);
            self.place_from(at + 1, held + new, instances);
            self.chosen.pop();
            self.machines[node].remove(self.problem, function, &row);
        }
    }

    /// Of machines that are equal and still empty, one stands for all.
    fn is_like_an_earlier_one(&self, node: usize, first: usize) -> bool {
        let alike = |other: usize| {
            let (a, b) = (&self.nodes[node], &self.nodes[other]);
            (a.cpus, a.gpus, a.memory) == (b.cpus, b.gpus, b.memory)
        };
        let empty =
            |n: usize| self.machines[n].bytes() == ByteSize::ZERO && !self.chosen.contains(&n);
        empty(node) && (first..node).any(|other| empty(other) && alike(other))
    }
}
