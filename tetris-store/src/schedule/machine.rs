//! What one machine holds while a plan is made, with the two sharing scores.

use carlsbad_types::ByteSize;

use super::Node;
use crate::runtime::ProfileRow;

/// Sums of shares such as ten times 0.1 are a little off; so much over is not too much.
const ROUNDING: f64 = 1e-9;

/// Functions and tensors by number.
#[derive(Debug)]
pub(super) struct Problem {
    sizes: Vec<ByteSize>,
    tensors: Vec<Vec<usize>>,
    /// Bytes that two functions have in common.
    overlap: Vec<Vec<ByteSize>>,
}

impl Problem {
    pub(super) fn new(sizes: Vec<ByteSize>, tensors: Vec<Vec<usize>>) -> Self {
        let overlap = tensors
            .iter()
            .map(|one| {
                let mut in_one = vec![false; sizes.len()];
                one.iter().for_each(|&tensor| in_one[tensor] = true);
                tensors
                    .iter()
                    .map(|other| {
                        let common = other.iter().filter(|&&tensor| in_one[tensor]);
                        common.map(|&tensor| sizes[tensor]).sum()
                    })
                    .collect()
            })
            .collect();
        Self {
            sizes,
            tensors,
            overlap,
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Machine {
    cpus: f64,
    gpu_shares: Vec<f64>,
    private: ByteSize,
    tensor_bytes: ByteSize,
    /// Instances by function.
    instances: Vec<u32>,
    /// Instances that use a tensor, by tensor.
    users: Vec<u32>,
}

impl Machine {
    pub(super) fn empty(problem: &Problem) -> Self {
        Self {
            cpus: 0.0,
            gpu_shares: Vec::new(),
            private: ByteSize::ZERO,
            tensor_bytes: ByteSize::ZERO,
            instances: vec![0; problem.tensors.len()],
            users: vec![0; problem.sizes.len()],
        }
    }

    pub(super) fn tensor_bytes(&self) -> ByteSize {
        self.tensor_bytes
    }

    pub(super) fn private_bytes(&self) -> ByteSize {
        self.private
    }

    pub(super) fn bytes(&self) -> ByteSize {
        self.private + self.tensor_bytes
    }

    /// The paper's score: the largest overlap with any one function here.
    pub(super) fn pairwise_score(&self, problem: &Problem, function: usize) -> ByteSize {
        let here = (0..self.instances.len()).filter(|&other| self.instances[other] > 0);
        here.map(|other| problem.overlap[function][other])
            .max()
            .unwrap_or(ByteSize::ZERO)
    }

    /// Ours: bytes of the function's tensors that are here.
    pub(super) fn union_score(&self, problem: &Problem, function: usize) -> ByteSize {
        let here = problem.tensors[function]
            .iter()
            .filter(|&&tensor| self.users[tensor] > 0);
        here.map(|&tensor| problem.sizes[tensor]).sum()
    }

    /// Bytes that would be new here.
    pub(super) fn missing(&self, problem: &Problem, function: usize) -> ByteSize {
        let missing = problem.tensors[function]
            .iter()
            .filter(|&&tensor| self.users[tensor] == 0);
        missing.map(|&tensor| problem.sizes[tensor]).sum()
    }

    /// Bytes that would go with the last instance that uses them.
    pub(super) fn freed_without(&self, problem: &Problem, function: usize) -> ByteSize {
        let alone = problem.tensors[function]
            .iter()
            .filter(|&&tensor| self.users[tensor] == 1);
        alone.map(|&tensor| problem.sizes[tensor]).sum()
    }

    /// Whether one more instance leaves CPU share, GPU shares and memory at 1 or below.
    pub(super) fn fits(
        &self,
        problem: &Problem,
        node: &Node,
        function: usize,
        row: &ProfileRow,
    ) -> bool {
        let memory = self.bytes() + row.memory + self.missing(problem, function);
        self.cpus + row.cpus <= node.cpus + ROUNDING
            && memory <= node.memory
            && (row.gpu_share == 0.0 || self.gpus_suffice(node.gpus, row.gpu_share))
    }

    /// Whether the shares, each of one GPU, fit into `gpus` GPUs: first fit decreasing, which may
    /// refuse a packing that a search would find, and never accepts one that is none.
    fn gpus_suffice(&self, gpus: u32, one_more: f64) -> bool {
        let mut shares = self.gpu_shares.clone();
        shares.push(one_more);
        shares.sort_by(|a, b| b.total_cmp(a));
        // No share spans two GPUs, so more GPUs than shares stay empty.
        let mut used = vec![0.0; shares.len().min(gpus as usize)];
        shares.iter().all(|share| {
            let room = used
                .iter_mut()
                .find(|used| **used + share <= 1.0 + ROUNDING);
            room.map(|used| *used += share).is_some()
        })
    }

    pub(super) fn add(&mut self, problem: &Problem, function: usize, row: &ProfileRow) {
        self.cpus += row.cpus;
        if row.gpu_share > 0.0 {
            self.gpu_shares.push(row.gpu_share);
        }
        self.private += row.memory;
        self.tensor_bytes += self.missing(problem, function);
        self.instances[function] += 1;
        for &tensor in &problem.tensors[function] {
            self.users[tensor] += 1;
        }
    }

    /// Undoes one [`Machine::add`] of the same values.
    pub(super) fn remove(&mut self, problem: &Problem, function: usize, row: &ProfileRow) {
        self.cpus -= row.cpus;
        if row.gpu_share > 0.0
            && let Some(at) = self.gpu_shares.iter().position(|&s| s == row.gpu_share)
        {
            self.gpu_shares.swap_remove(at);
        }
        self.private = self.private.saturating_sub(row.memory);
        let freed = self.freed_without(problem, function);
        self.tensor_bytes = self.tensor_bytes.saturating_sub(freed);
        self.instances[function] -= 1;
        for &tensor in &problem.tensors[function] {
            self.users[tensor] -= 1;
        }
    }
}
