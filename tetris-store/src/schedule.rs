//! Placement: which instances on which machine, so that they share the most.
//!
//! Both ways choose the configuration of each instance by its profile ([`Profile::by_cost`]), take
//! `rps_max` off the load that is left, and go on until none is. They differ in where an instance
//! goes:
//! - [`Placement::Pairwise`], the paper's: to the feasible machine with the largest sharing score,
//!   the score being the largest overlap with any *one* function there;
//! - [`Placement::Union`], ours: the score is what the machine holds of the function's tensors in
//!   all, whoever brought them. The plan, and the paper's, are then improved by moving and swapping
//!   instances, small ones by bounded exhaustive search, and the best one is returned: it never
//!   holds more bytes than the paper's.
//!
//! Where something fits nowhere, the paper's loop goes on for ever; here it is an [`Infeasible`].

mod machine;
mod search;

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::time::Duration;

use carlsbad_types::ByteSize;
use serde::{Deserialize, Serialize};

use self::machine::{Machine, Problem};
use crate::error::{Error, Result};
use crate::id::TensorId;
use crate::manifest::Manifest;
use crate::runtime::{CpuPrice, Profile, ProfileRow, seconds};

/// Instances of one plan: more than that is a mistake in the input (a rate in requests a day, a
/// latency in microseconds).
const MOST_INSTANCES: usize = 10_000;

/// A machine as the planner sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its CPU cores.
    pub cpus: f64,
    /// Its GPUs. An instance's share is of one of them.
    #[serde(default)]
    pub gpus: u32,
    /// Memory for instances and for tensors together.
    pub memory: ByteSize,
}

/// A function to be served: its model, what its instances can do, and the load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// Its tensors with their sizes. Equal keys are the same bytes: ids as of [`TensorId`].
    pub tensors: Vec<(String, ByteSize)>,
    /// Its measured configurations.
    pub profile: Profile,
    /// Time in which a request must be answered, in seconds where serialised.
    #[serde(rename = "slo_s", with = "seconds")]
    pub slo: Duration,
    /// Requests a second.
    pub rps: f64,
}

impl Function {
    /// The tensors of a stored model, as [`Function::tensors`] wants them.
    pub fn tensors_of(manifest: &Manifest) -> Vec<(String, ByteSize)> {
        let unique: BTreeSet<(TensorId, u64)> =
            manifest.tensors.iter().map(|t| (t.id, t.len)).collect();
        unique
            .into_iter()
            .map(|(id, len)| (id.to_string(), ByteSize::new(len)))
            .collect()
    }
}

/// How an instance finds its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// The paper's: largest overlap with any one function of the machine.
    Pairwise,
    /// Ours: bytes of the union, then search.
    #[default]
    Union,
}

/// One instance of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Instance {
    /// Index of its function.
    pub function: usize,
    /// Index of its machine.
    pub node: usize,
    /// Its configuration.
    pub row: ProfileRow,
    /// The load it is meant to take, in requests a second.
    pub rps: f64,
}

/// Where every instance goes, and what that takes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// The instances, by function and machine.
    pub instances: Vec<Instance>,
    /// Bytes of tensors that each machine holds, one copy each.
    pub tensor_bytes: Vec<ByteSize>,
    /// Bytes that the instances of each machine take for themselves.
    pub private_bytes: Vec<ByteSize>,
}

impl Plan {
    /// Bytes held on all machines.
    pub fn bytes(&self) -> ByteSize {
        self.tensor_bytes
            .iter()
            .chain(&self.private_bytes)
            .copied()
            .sum()
    }
}

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Infeasible {
    /// No configuration of the function answers in time.
    Slo {
        /// The function's name.
        function: String,
        /// What it asks for.
        slo: Duration,
        /// The shortest that its profile can do.
        least: Duration,
    },
    /// Not even the smallest instance of the function fits on any machine beside the others.
    Capacity {
        /// The function's name.
        function: String,
        /// Load that is served by nobody yet, in requests a second.
        left_rps: f64,
        /// The cheapest configuration that would help.
        row: ProfileRow,
    },
}

impl fmt::Display for Infeasible {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Slo {
                function,
                slo,
                least,
            } => write!(
                f,
                "no profiled configuration of `{function}` answers within {slo:?}; the shortest SLO it can keep is {least:?}"
            ),
            Self::Capacity {
                function,
                left_rps,
                row,
            } => write!(
                f,
                "{left_rps:.1} requests/s of `{function}` are left and no machine has room for one more instance ({} CPUs, {} of a GPU, {} and its tensors): add machines or lower the load",
                row.cpus, row.gpu_share, row.memory
            ),
        }
    }
}

impl std::error::Error for Infeasible {}

/// Places instances for the whole load of `functions` on `nodes`.
///
/// # Errors
/// [`Error::Infeasible`] where the load cannot be served, [`Error::BadPlacement`] where a number
/// of the input cannot be.
pub fn place(
    functions: &[Function],
    nodes: &[Node],
    price: CpuPrice,
    placement: Placement,
) -> Result<Plan> {
    let problem = checked(functions, nodes)?;
    let paper = greedy(&problem, functions, nodes, price, Placement::Pairwise);
    if placement == Placement::Pairwise {
        return Ok(paper?.into_plan(&problem, nodes.len()));
    }
    let union = greedy(&problem, functions, nodes, price, Placement::Union);
    let best = match (union, paper) {
        (Ok(union), Ok(paper)) => [union, paper]
            .map(|draft| search::improve(&problem, nodes, draft))
            .into_iter()
            .min_by_key(|draft| draft.bytes(&problem, nodes.len())),
        (Ok(draft), Err(_)) | (Err(_), Ok(draft)) => Some(search::improve(&problem, nodes, draft)),
        (Err(refused), Err(_)) => return Err(refused),
    };
    Ok(best.unwrap_or_default().into_plan(&problem, nodes.len()))
}

/// The input with tensors as small numbers.
fn checked(functions: &[Function], nodes: &[Node]) -> Result<Problem> {
    let bad = |what: &str, name: &str, why| Error::BadPlacement {
        what: format!("{what} `{name}`"),
        why,
    };
    for node in nodes {
        if !(node.cpus.is_finite() && node.cpus >= 0.0) {
            return Err(bad("machine", &node.name, "`cpus` is no number from 0 on"));
        }
    }
    let mut numbers: HashMap<&str, usize> = HashMap::new();
    let mut sizes = Vec::new();
    let mut tensors = Vec::with_capacity(functions.len());
    for function in functions {
        if !(function.rps.is_finite() && function.rps >= 0.0) {
            return Err(bad(
                "function",
                &function.name,
                "`rps` is no number from 0 on",
            ));
        }
        let mut own = BTreeSet::new();
        for (id, size) in &function.tensors {
            let number = *numbers.entry(id).or_insert_with(|| {
                sizes.push(*size);
                sizes.len() - 1
            });
            if sizes.get(number) != Some(size) {
                return Err(bad("function", &function.name, "a tensor has two sizes"));
            }
            own.insert(number);
        }
        tensors.push(own.into_iter().collect());
    }
    Ok(Problem::new(sizes, tensors))
}

/// Instances with machines, before they are reported.
#[derive(Debug, Clone, Default)]
struct Draft(Vec<Instance>);

impl Draft {
    fn machines(&self, problem: &Problem, nodes: usize) -> Vec<Machine> {
        let mut machines = vec![Machine::empty(problem); nodes];
        for instance in &self.0 {
            machines[instance.node].add(problem, instance.function, &instance.row);
        }
        machines
    }

    fn bytes(&self, problem: &Problem, nodes: usize) -> ByteSize {
        self.machines(problem, nodes)
            .iter()
            .map(Machine::bytes)
            .sum()
    }

    fn into_plan(mut self, problem: &Problem, nodes: usize) -> Plan {
        let machines = self.machines(problem, nodes);
        self.0.sort_by_key(|i| (i.function, i.node));
        Plan {
            instances: self.0,
            tensor_bytes: machines.iter().map(Machine::tensor_bytes).collect(),
            private_bytes: machines.iter().map(Machine::private_bytes).collect(),
        }
    }
}

/// While load is left: the cheapest configuration that fits anywhere, on the feasible machine with
/// the highest score; then `rps_max` less is left.
fn greedy(
    problem: &Problem,
    functions: &[Function],
    nodes: &[Node],
    price: CpuPrice,
    placement: Placement,
) -> Result<Draft> {
    let mut machines = vec![Machine::empty(problem); nodes.len()];
    let mut draft = Vec::new();
    for (index, function) in functions.iter().enumerate() {
        let mut left = function.rps;
        while left > 0.0 {
            if draft.len() == MOST_INSTANCES {
                return Err(Error::BadPlacement {
                    what: format!("function `{}`", function.name),
                    why: "its load asks for more than 10,000 instances",
                });
            }
            let rows = function.profile.by_cost(function.slo, price, left);
            let Some(&cheapest) = rows.first() else {
                return Err(Error::Infeasible(Infeasible::Slo {
                    function: function.name.clone(),
                    slo: function.slo,
                    least: function.profile.least_slo(),
                }));
            };
            let found = rows.iter().find_map(|row| {
                let fitting = (0..nodes.len())
                    .filter(|&node| machines[node].fits(problem, &nodes[node], index, row));
                // Of machines that score the same, the first: `max_by_key` would take the last.
                let node = fitting.rev().max_by_key(|&node| match placement {
                    Placement::Pairwise => machines[node].pairwise_score(problem, index),
                    Placement::Union => machines[node].union_score(problem, index),
                })?;
                Some((node, *row))
            });
            let Some((node, row)) = found else {
                return Err(Error::Infeasible(Infeasible::Capacity {
                    function: function.name.clone(),
                    left_rps: left,
                    row: cheapest,
                }));
            };
            machines[node].add(problem, index, &row);
            draft.push(Instance {
                function: index,
                node,
                row,
                rps: left.min(row.rps_max()),
            });
            left -= row.rps_max();
        }
    }
    Ok(Draft(draft))
}

#[cfg(test)]
mod tests;
