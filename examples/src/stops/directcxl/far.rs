//! A chain through all cache lines of a namespace, followed in three ways.

use std::time::Instant;

use anyhow::{Result, ensure};
use carlsbad_kit::page_swap::{PAGE, PageSwap};
use carlsbad_kit::seed::Rng;
use directcxl::Namespace;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

const LINE: usize = 64;
/// Samples of each way.
const SAMPLES: usize = 400;

/// The chain: which line each one names. One random cycle through all.
pub(super) struct Chain {
    next: Vec<u32>,
}

/// Nanoseconds of a read, as means of batches, and whether each read gave what was written.
pub(super) struct Followed {
    pub(super) ns: Vec<f64>,
    pub(super) right: bool,
}

impl Chain {
    /// Makes a chain, and writes it into memory.
    pub(super) fn write(memory: &Namespace) -> Result<Self> {
        let lines = memory.length().get() as usize / LINE;
        let mut rng = Rng::with_seed(22);
        let mut next: Vec<u32> = (0..lines as u32).collect();
        for i in (1..lines).rev() {
            next.swap(i, rng.usize(..i));
        }
        let mut bytes = vec![0; next.len() * LINE];
        for (line, next) in bytes.chunks_mut(LINE).zip(&next) {
            line[..4].copy_from_slice(&next.to_le_bytes());
        }
        memory.write(0, &bytes)?;
        memory.publish(0..bytes.len() as u64)?;
        Ok(Self { next })
    }

    /// Follows the chain in batches of `batch`; `read` gives the number in a line.
    fn follow(&self, batch: usize, mut read: impl FnMut(usize) -> u32) -> Followed {
        let (mut at, mut expected) = (0, 0);
        let mut right = true;
        let mut ns = Vec::with_capacity(SAMPLES);
        // The first tenth warms up.
        for sample in 0..SAMPLES + SAMPLES / 10 {
            let start = Instant::now();
            for _ in 0..batch {
                at = read(at) as usize;
            }
            let elapsed = start.elapsed().as_secs_f64() * 1e9 / batch as f64;
            for _ in 0..batch {
                expected = self.next[expected] as usize;
            }
            right &= at == expected;
            if sample >= SAMPLES / 10 {
                ns.push(elapsed);
            }
        }
        Followed { ns, right }
    }

    /// By loads.
    #[allow(clippy::cast_ptr_alignment, reason = "a line is aligned to 64 bytes")]
    pub(super) fn direct(&self, memory: &Namespace) -> Followed {
        let base = memory.as_ptr().as_ptr().cast_const();
        self.follow(2000, |line| {
            let at = base.wrapping_add(line * LINE).cast::<u32>();
            // SAFETY: the chain's lines lie within the namespace, which lives.
            unsafe { at.read_volatile() }
        })
    }

    /// By copies out of another process.
    pub(super) fn one_sided(&self, process: u32, there: usize) -> Result<Followed> {
        let process = Pid::from_raw(i32::try_from(process)?);
        let mut failed = None;
        let followed = self.follow(500, |line| {
            let mut bytes = [0u8; LINE];
            let from = [RemoteIoVec {
                base: there + line * LINE,
                len: LINE,
            }];
            let mut to = [std::io::IoSliceMut::new(&mut bytes)];
            match process_vm_readv(process, &mut to, &from) {
                Ok(LINE) => {}
                other => failed = Some(other),
            }
            u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
        });
        ensure!(failed.is_none(), "a one-sided copy failed: {failed:?}");
        Ok(followed)
    }

    /// Through pages of which a tenth is here.
    #[allow(clippy::cast_ptr_alignment, reason = "a line is aligned to 64 bytes")]
    pub(super) fn page_swap(&self, memory: &Namespace) -> Result<Followed> {
        let length = self.next.len() * LINE;
        let mut far = vec![0; length];
        memory.read(0, &mut far)?;
        let pages = length / PAGE;
        let swap = PageSwap::new(length, pages / 10, move |page, into| {
            into.copy_from_slice(&far[page * PAGE..][..PAGE]);
        })?;
        Ok(self.follow(20, |line| {
            let at = swap.as_ptr().wrapping_add(line * LINE).cast::<u32>();
            // SAFETY: the chain's lines lie within the range, which lives.
            unsafe { at.read_volatile() }
        }))
    }
}
