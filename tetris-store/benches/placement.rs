//! Figure 6: bytes that union placement holds, beside the paper's placement on seeded clusters, and
//! beside brute force on clusters small enough for that.
//!
//! Counted, not timed: the same on every machine. What is reported is the *worst* of all clusters;
//! what is gained on the others is in the note.
#![allow(
    clippy::unwrap_used,
    reason = "a bench says what went wrong by failing"
)]

use std::collections::HashSet;
use std::time::Duration;

use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::sample::{Interleaved, median, quantile, time_ms};
use carlsbad_kit::seed::Rng;
use carlsbad_types::ByteSize;
use tetris_store::runtime::{CpuPrice, Profile, ProfileRow};
use tetris_store::schedule::{Function, Instance, Node, Placement, Plan, place};

fn main() {
    let clusters = if is_quick() { 3 } else { 400 };
    // 20 functions in families on 8 machines; then up to 4 functions of 1 or 2 instances on 3.
    let large = compare(clusters, 1, 8, 20, 4);
    large
        .figure(
            "tetris-store/6",
            "the paper's placement",
            "bytes held by union placement, worst case over seeded clusters",
        )
        .emit()
        .unwrap();
    let small = against_brute_force(clusters);
    small
        .figure(
            "tetris-store/6b",
            "brute force",
            "bytes held by union placement on small clusters, worst case",
        )
        .emit()
        .unwrap();
}

/// Bytes of every cluster.
#[derive(Default)]
struct Held {
    ours: Vec<f64>,
    rival: Vec<f64>,
    refused: usize,
    ms: Vec<f64>,
}

impl Held {
    fn figure(&self, id: &str, rival: &str, what: &str) -> Figure {
        let ratios: Vec<f64> = self
            .ours
            .iter()
            .zip(&self.rival)
            .map(|(a, b)| a / b)
            .collect();
        let worst = (0..ratios.len())
            .max_by(|&a, &b| ratios[a].total_cmp(&ratios[b]))
            .unwrap();
        let samples = Interleaved {
            ours: vec![self.ours[worst]],
            rival: vec![self.rival[worst]],
        };
        let note = format!(
            "{} clusters, seeds 0 to {}; median {:.3}, best {:.3}; {} that only one side can \
             place, or neither; a plan takes {:.1} ms (median)",
            ratios.len(),
            ratios.len() + self.refused - 1,
            median(&ratios),
            quantile(&ratios, 0.0),
            self.refused,
            median(&self.ms),
        );
        Figure::new(id, what, "MiB")
            .against(rival, samples)
            .note(note)
    }
}

fn mib(bytes: ByteSize) -> f64 {
    bytes.get() as f64 / (1 << 20) as f64
}

fn compare(clusters: u64, least: u32, nodes: usize, functions: usize, loads: u32) -> Held {
    let mut held = Held::default();
    for seed in 0..clusters {
        let (functions, nodes) = cluster(seed, nodes, functions, least..=loads);
        let mut ours = None;
        held.ms.push(time_ms(|| {
            ours = planned(&functions, &nodes, Placement::Union);
        }));
        let paper = planned(&functions, &nodes, Placement::Pairwise);
        match (ours, paper) {
            (Some(ours), Some(paper)) => {
                held.ours.push(mib(ours.bytes()));
                held.rival.push(mib(paper.bytes()));
            }
            _ => held.refused += 1,
        }
    }
    held
}

fn against_brute_force(clusters: u64) -> Held {
    let mut held = Held::default();
    for seed in 0..clusters {
        let (functions, nodes) = cluster(seed, 3, 4, 1..=2);
        let mut ours = None;
        held.ms.push(time_ms(|| {
            ours = planned(&functions, &nodes, Placement::Union);
        }));
        let Some(ours) = ours else {
            held.refused += 1;
            continue;
        };
        let mut chosen = Vec::new();
        let best = brute_force(&functions, &nodes, &ours.instances, &mut chosen).unwrap();
        held.ours.push(mib(ours.bytes()));
        held.rival.push(mib(best));
    }
    held
}

fn planned(functions: &[Function], nodes: &[Node], placement: Placement) -> Option<Plan> {
    place(functions, nodes, CpuPrice::default(), placement).ok()
}

/// Functions of some families. A function has most of its family's frozen layers, a few of another
/// family's (a pipeline of two models), and a head of its own.
fn cluster(
    seed: u64,
    nodes: usize,
    functions: usize,
    loads: std::ops::RangeInclusive<u32>,
) -> (Vec<Function>, Vec<Node>) {
    let mut random = Rng::with_seed(seed);
    let families = 2 + random.usize(0..3);
    let layer = |family: usize, layer: usize| {
        let size = ByteSize::mib(4 + (family * 7 + layer * 3) as u64 % 12);
        (format!("family {family} layer {layer}"), size)
    };
    let functions: Vec<_> = (0..functions)
        .map(|number| {
            let family = random.usize(0..families);
            let frozen = random.usize(4..=12);
            let mut tensors: Vec<_> = (0..frozen).map(|l| layer(family, l)).collect();
            if random.f64() < 0.4 {
                let other = (family + 1) % families;
                tensors.extend((0..random.usize(2..=8)).map(|l| layer(other, l)));
            }
            tensors.push((format!("head {number}"), ByteSize::mib(random.u64(1..10))));
            let row = ProfileRow {
                cpus: 1.0,
                gpu_share: 0.0,
                memory: ByteSize::mib(30),
                batch: 1,
                concurrency: 1,
                latency: Duration::from_millis(100),
            };
            Function {
                name: format!("f{number}"),
                tensors,
                profile: Profile::new(vec![row]).unwrap(),
                slo: Duration::from_millis(150),
                // Ten requests a second are one instance.
                rps: 10.0 * f64::from(random.u32(loads.clone())),
            }
        })
        .collect();
    let instances: f64 = functions.iter().map(|f| f.rps / 10.0).sum();
    let cpus = (instances * 1.3 / nodes as f64).ceil();
    let node = |number| Node {
        name: format!("n{number}"),
        cpus: cpus + f64::from(random.u32(0..2)),
        gpus: 0,
        memory: ByteSize::mib(random.u64(600..1_200)),
    };
    (functions, (0..nodes).map(node).collect())
}

/// Fewest bytes of any assignment that fits, by trying them all; counted from the functions alone.
fn brute_force(
    functions: &[Function],
    nodes: &[Node],
    instances: &[Instance],
    chosen: &mut Vec<usize>,
) -> Option<ByteSize> {
    if chosen.len() < instances.len() {
        return (0..nodes.len())
            .filter_map(|node| {
                chosen.push(node);
                let best = brute_force(functions, nodes, instances, chosen);
                chosen.pop();
                best
            })
            .min();
    }
    let mut all = ByteSize::ZERO;
    for (number, node) in nodes.iter().enumerate() {
        let here = || {
            let pairs = instances.iter().zip(&*chosen);
            pairs.filter(|(_, at)| **at == number).map(|(it, _)| it)
        };
        let unique: HashSet<_> = here()
            .flat_map(|it| &functions[it.function].tensors)
            .collect();
        let tensors: ByteSize = unique.iter().map(|(_, size)| *size).sum();
        let bytes = tensors + here().map(|it| it.row.memory).sum();
        let cpus: f64 = here().map(|it| it.row.cpus).sum();
        if bytes > node.memory || cpus > node.cpus {
            return None;
        }
        all += bytes;
    }
    Some(all)
}
