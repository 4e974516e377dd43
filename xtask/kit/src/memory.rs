//! What processes really use, as the kernel counts it.
//!
//! Shared pages are judged by the sum of PSS over all processes together with the machine's
//! shared memory: a tmpfs page that a single process maps shows as that process' private page,
//! and a tmpfs page that nobody maps shows in no process at all.

use std::fs;
use std::io;
use std::path::Path;

use carlsbad_types::ByteSize;

/// The memory of one process, or of a part of its mappings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryUse {
    /// Resident pages, each counted in full.
    pub rss: ByteSize,
    /// Resident pages, each divided by the number of processes that map it.
    pub pss: ByteSize,
    /// The part of `pss` that is shared memory and tmpfs pages. The kernel gives it for whole
    /// processes only: it is zero for chosen mappings.
    pub pss_shmem: ByteSize,
    /// Pages that belong to no file: heap, stacks, copies made on write.
    pub anonymous: ByteSize,
    /// Pages that this process alone maps and has written to. A page of a tmpfs file that only one
    /// process maps counts here as well: use `anonymous` for copies made on write.
    pub private_dirty: ByteSize,
    /// Pages that this process alone maps and has not written to.
    pub private_clean: ByteSize,
    /// Pages that another process maps too.
    pub shared: ByteSize,
    /// Pages in swap.
    pub swap: ByteSize,
}

impl MemoryUse {
    /// The memory of process `pid`.
    ///
    /// # Errors
    /// Where the process is gone, or belongs to another user.
    pub fn of(pid: u32) -> io::Result<Self> {
        Self::read(Path::new(&format!("/proc/{pid}/smaps_rollup")), |_| true)
    }

    /// The memory of this process.
    ///
    /// # Errors
    /// Where `/proc` is not mounted.
    pub fn of_self() -> io::Result<Self> {
        Self::read(Path::new("/proc/self/smaps_rollup"), |_| true)
    }

    /// The mappings of process `pid` whose name (a path, `[heap]`, or nothing) `choose` takes.
    ///
    /// # Errors
    /// Where the process is gone, or belongs to another user.
    pub fn of_mappings(pid: u32, choose: impl Fn(&str) -> bool) -> io::Result<Self> {
        Self::read(Path::new(&format!("/proc/{pid}/smaps")), choose)
    }

    /// The sum over processes.
    ///
    /// # Errors
    /// Where one of them is gone.
    pub fn sum(pids: impl IntoIterator<Item = u32>) -> io::Result<Self> {
        let mut sum = Self::default();
        for pid in pids {
            sum.add(&Self::of(pid)?);
        }
        Ok(sum)
    }

    fn add(&mut self, other: &Self) {
        self.rss += other.rss;
        self.pss += other.pss;
        self.pss_shmem += other.pss_shmem;
        self.anonymous += other.anonymous;
        self.private_dirty += other.private_dirty;
        self.private_clean += other.private_clean;
        self.shared += other.shared;
        self.swap += other.swap;
    }

    fn read(path: &Path, choose: impl Fn(&str) -> bool) -> io::Result<Self> {
        Ok(Self::parse(&fs::read_to_string(path)?, choose))
    }

    fn parse(text: &str, choose: impl Fn(&str) -> bool) -> Self {
        let mut sum = Self::default();
        let mut chosen = false;
        for line in text.lines() {
            let Some((key, rest)) = line.split_once(' ') else {
                continue;
            };
            let Some(key) = key.strip_suffix(':') else {
                // A mapping's first line: address, permissions, offset, device, inode, name.
                let name = rest.splitn(5, ' ').nth(4).unwrap_or("").trim();
                chosen = choose(name);
                continue;
            };
            let field = match key {
                "Rss" => &mut sum.rss,
                "Pss" => &mut sum.pss,
                "Pss_Shmem" => &mut sum.pss_shmem,
                "Anonymous" => &mut sum.anonymous,
                "Private_Dirty" => &mut sum.private_dirty,
                "Private_Clean" => &mut sum.private_clean,
                "Shared_Clean" | "Shared_Dirty" => &mut sum.shared,
                "Swap" => &mut sum.swap,
                _ => continue,
            };
            if chosen {
                *field += kib(rest);
            }
        }
        sum
    }
}

/// The machine's shared memory and tmpfs pages (`Shmem` of `/proc/meminfo`), mapped or not.
///
/// # Errors
/// Where `/proc` is not mounted.
pub fn shmem() -> io::Result<ByteSize> {
    meminfo("Shmem")
}

/// The memory that could be given to new processes without swapping (`MemAvailable`).
///
/// # Errors
/// Where `/proc` is not mounted.
pub fn available() -> io::Result<ByteSize> {
    meminfo("MemAvailable")
}

/// One line of `/proc/meminfo`, by its name.
///
/// # Errors
/// Where `/proc` is not mounted or the kernel has no such line.
pub fn meminfo(name: &str) -> io::Result<ByteSize> {
    let text = fs::read_to_string("/proc/meminfo")?;
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| *key == name)
        .map(|(_, rest)| kib(rest))
        .ok_or_else(|| io::Error::other(format!("/proc/meminfo has no line {name}")))
}

/// The number of a `  123 kB`.
fn kib(text: &str) -> ByteSize {
    let number = text.trim().trim_end_matches("kB").trim();
    ByteSize::kib(number.parse().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::{MemoryUse, available, shmem};
    use carlsbad_types::ByteSize;

    const SMAPS: &str = "\
7f00-7f10 r--p 00000000 00:1b 42                 /dev/shm/store/objects/ab/abcd
Rss:                  64 kB
Pss:                   8 kB
Shared_Clean:         64 kB
Anonymous:             0 kB
VmFlags: rd mr mw
7f20-7f30 rw-p 00000000 00:00 0 
Rss:                   4 kB
Pss:                   4 kB
Private_Dirty:         4 kB
Anonymous:             4 kB
";

    #[test]
    fn sums_all_mappings_or_the_chosen_ones() {
        let all = MemoryUse::parse(SMAPS, |_| true);
        assert_eq!(all.rss, ByteSize::kib(68));
        assert_eq!(all.pss, ByteSize::kib(12));
        assert_eq!(all.anonymous, ByteSize::kib(4));
        let store = MemoryUse::parse(SMAPS, |name| name.starts_with("/dev/shm/"));
        assert_eq!(store.pss, ByteSize::kib(8));
        assert_eq!(store.shared, ByteSize::kib(64));
        assert_eq!(store.anonymous, ByteSize::ZERO);
    }

    #[test]
    fn reads_this_process_and_this_machine() {
        let before = MemoryUse::of_self().unwrap();
        let block = vec![1u8; 32 << 20];
        let after = MemoryUse::of(std::process::id()).unwrap();
        assert!(after.anonymous.get() > before.anonymous.get() + (16 << 20));
        assert_eq!(block.len(), 32 << 20);
        assert!(available().unwrap() > ByteSize::mib(1));
        shmem().unwrap();
    }
}
