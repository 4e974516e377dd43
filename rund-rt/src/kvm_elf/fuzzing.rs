//! What the fuzz targets and property tests reach into: the parsers of what strangers made.

use super::layout::{LARGE, system};
use super::page_table::Words;

/// Memory for page tables alone.
#[derive(Debug)]
pub struct Tables(Vec<u64>);

impl Tables {
    /// Zeros.
    pub fn new() -> Self {
        Self(vec![0; (LARGE / 8) as usize])
    }

    /// What a processor finds at `address`: where it lies, whether user mode may write to it, and
    /// whether it may execute it.
    pub fn walk(&self, address: u64) -> Option<(u64, bool, bool)> {
        let mut table = system::TABLES;
        let (mut user, mut write, mut execute) = (true, true, true);
        for level in (0..4).rev() {
            let entry = self.word(table + (address >> (12 + 9 * level) & 511) * 8);
            if entry & 1 == 0 {
                return None;
            }
            write &= entry & 2 != 0;
            user &= entry & 4 != 0;
            execute &= entry >> 63 == 0;
            let large = entry & 0x80 != 0;
            if level == 0 || large {
                let size = 1u64 << (12 + 9 * level);
                let at = entry & 0x000f_ffff_ffff_f000;
                return user.then_some(((at & !(size - 1)) + address % size, write, execute));
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
        None
    }
}

impl Words for Tables {
    fn word(&self, offset: u64) -> u64 {
        self.0.get((offset / 8) as usize).copied().unwrap_or(0)
    }

    fn set_word(&mut self, offset: u64, value: u64) {
        if let Some(word) = self.0.get_mut((offset / 8) as usize) {
            *word = value;
        }
    }
}

#[cfg(fuzzing)]
pub use targets::{calls, elf, template};

#[cfg(fuzzing)]
#[allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a target says what went wrong by failing"
)]
mod targets {
    use std::fs;
    use std::os::fd::OwnedFd;
    use std::path::{Path, PathBuf};
    use std::rc::Rc;
    use std::time::Duration;

    use carlsbad_types::ByteSize;

    use super::super::builder::new_kernel;
    use super::super::calls::account::{Account, Lock};
    use super::super::calls::layers::{Layers, Upper};
    use super::super::calls::space::Space;
    use super::super::calls::table::Open;
    use super::super::calls::{Call, Kernel, Outcome, Program};
    use super::super::elf::{self, LoadPlan, Segment};
    use super::super::layout::{Layout, PIE_BASE, system};
    use super::super::memory::GuestMemory;
    use super::super::open_directory;
    use super::super::{interrupt, page_table, template};
    use super::Tables;

    /// A program's file.
    pub fn elf(bytes: &[u8]) {
        let head = bytes.get(..elf::HEAD as usize).unwrap_or(bytes);
        let Ok(plan) = elf::plan(head, bytes.len() as u64) else {
            return;
        };
        for segment in &plan.segments {
            assert!(segment.file_offset + segment.file_len <= bytes.len() as u64);
        }
        let Ok(layout) = Layout::new(&plan, ByteSize::mib(64)) else {
            return;
        };
        let mut tables = Tables::new();
        if page_table::write(&mut tables, &layout, system::TABLES).is_err() {
            return;
        }
        for region in &layout.regions {
            assert!(region.offset + region.len <= layout.memory);
            let found = tables.walk(region.address);
            assert_eq!(found, Some((region.offset, region.write, region.execute)));
        }
    }

    /// A template's file: its beginning, and its description as if the checksum were right.
    pub fn template(bytes: &[u8]) {
        let path = Path::new("/dev/shm").join(format!("rund-fuzz-{}", std::process::id()));
        fs::write(&path, bytes).unwrap();
        let loaded = template::load(&path);
        fs::remove_file(&path).unwrap();
        assert!(loaded.is_err() || bytes.len() > 44);
        if let Ok(state) = template::parse_state(bytes, 1 << 20) {
            let _too_large = Layout::new(&state.plan, ByteSize::new(state.memory));
        }
    }

    /// Names that a guest could try.
    const NAMES: [&[u8]; 16] = [
        b"/",
        b".",
        b"..",
        b"/data/words",
        b"/tmp",
        b"/tmp/x",
        b"/tmp/x/y",
        b"/data/escape",
        b"/data/../../secret",
        b"data/link",
        b"/proc/self/exe",
        b"/dev/null",
        b"/dev/urandom",
        b".wh.x",
        b"/data/.wh..wh..opq",
        b"/bin/program",
    ];

    struct Input<'a>(&'a [u8]);

    impl Input<'_> {
        fn byte(&mut self) -> Option<u8> {
            let (first, rest) = self.0.split_first()?;
            self.0 = rest;
            Some(*first)
        }

        fn word(&mut self) -> Option<u64> {
            let (first, rest) = self.0.split_first_chunk()?;
            self.0 = rest;
            Some(u64::from_le_bytes(*first))
        }

        /// An argument: a number, a descriptor, or an address with or without something there.
        fn argument(&mut self, heap: u64) -> Option<u64> {
            let kind = self.byte()?;
            let value = u64::from(kind >> 3);
            Some(match kind & 7 {
                0 => value,
                1 => heap + 0x100 + (value % 16) * 0x40,
                2 => heap + 0x1000 + value * 0x80,
                3 => self.word()?,
                4 => libc::AT_FDCWD as u64,
                5 => 1 << (value * 2),
                6 => u64::from(self.byte()?) << 4,
                _ => u64::MAX - value,
            })
        }
    }

    struct Files {
        base: PathBuf,
        before: Vec<(PathBuf, Vec<u8>)>,
        account: &'static Account,
        locks: &'static OwnedFd,
    }

    /// All that a guest must not change.
    fn content(of: &Path) -> Vec<(PathBuf, Vec<u8>)> {
        let mut all = Vec::new();
        let mut open = vec![of.to_path_buf()];
        while let Some(at) = open.pop() {
            let kind = fs::symlink_metadata(&at).unwrap().file_type();
            if kind.is_dir() {
                open.extend(
                    fs::read_dir(&at)
                        .unwrap()
                        .map(|entry| entry.unwrap().path()),
                );
                all.push((at, Vec::new()));
            } else if kind.is_symlink() {
                let target = fs::read_link(&at).unwrap();
                all.push((at, target.into_os_string().into_encoded_bytes()));
            } else {
                let bytes = fs::read(&at).unwrap();
                all.push((at, bytes));
            }
        }
        all.sort();
        all
    }

    impl Files {
        fn new() -> Self {
            let base = PathBuf::from(format!("/dev/shm/rund-fuzz-calls-{}", std::process::id()));
            let _none = fs::remove_dir_all(&base);
            for name in ["shown/data/deep", "shown/tmp", "shown/bin", "upper"] {
                fs::create_dir_all(base.join(name)).unwrap();
            }
            let shown = base.join("shown");
            fs::write(base.join("secret"), "not the guest's").unwrap();
            fs::write(shown.join("data/words"), "some words\n".repeat(500)).unwrap();
            fs::write(shown.join("bin/program"), "#!/bin/program x\n").unwrap();
            for (name, target) in [("link", "words"), ("escape", "../../../secret")] {
                std::os::unix::fs::symlink(target, shown.join("data").join(name)).unwrap();
            }
            Self {
                before: content(&shown),
                base: base.clone(),
                account: Account::new().unwrap(),
                locks: Box::leak(Box::new(
                    fs::File::create(base.join("locks")).unwrap().into(),
                )),
            }
        }

        fn check(&self) {
            assert_eq!(content(&self.base.join("shown")), self.before);
            assert_eq!(
                fs::read(self.base.join("secret")).unwrap(),
                b"not the guest's"
            );
            assert_eq!(fs::read_dir(&self.base).unwrap().count(), 4);
        }
    }

    thread_local! {
        static FILES: Files = Files::new();
    }

    fn directory(path: &Path) -> OwnedFd {
        open_directory(path).unwrap()
    }

    /// System calls of a guest that wants to get out: numbers and arguments from `bytes`.
    pub fn calls(bytes: &[u8]) {
        FILES.with(|files| {
            // What would wait for ever is interrupted.
            interrupt::install().unwrap();
            interrupt::set(Some(Duration::from_millis(1)));
            run(files, bytes);
            interrupt::stop();
            files.check();
        });
    }

    fn run(files: &Files, bytes: &[u8]) {
        let plan = LoadPlan {
            entry: PIE_BASE,
            headers: 0,
            header_size: 0,
            header_count: 0,
            segments: vec![Segment {
                address: PIE_BASE,
                len: 0x4000,
                file_offset: 0,
                file_len: 0,
                write: true,
                execute: true,
            }],
        };
        let layout = Layout::new(&plan, ByteSize::mib(32)).unwrap();
        let memory = GuestMemory::new(&layout).unwrap();
        let heap = layout.heap.address;
        for (i, name) in (0..).zip(NAMES) {
            memory.write(heap + 0x100 + i * 0x40, name).unwrap();
        }
        let upper = Upper {
            base: directory(&files.base.join("upper")),
            name: "layer".into(),
            most: 1 << 20,
            account: &files.account.upper,
            lock: Lock::new(files.locks, 1),
            directory: None,
        };
        let layers = Layers::new(Some(directory(&files.base.join("shown"))), Some(upper));
        let program = fs::File::open(files.base.join("shown/bin/program")).unwrap();
        let program = Program {
            fd: Rc::new(program.into()),
            offset: 0,
            len: 17,
            changes: false,
            held: None,
        };
        let space = Space::new(&layout);
        space.publish(&memory);
        files.account.begin(1 << 16, 1);
        let sink = Box::new(|_: u8, _: &[u8]| true);
        let mut kernel = new_kernel(program, b"/bin/program", space, layers, files.account, sink);
        kernel.identity.pid = 77;
        kernel.table.open(Open::Null, false).unwrap();
        kernel.table.open(Open::Captured(1), false).unwrap();
        kernel.table.open(Open::Captured(2), false).unwrap();

        let mut input = Input(bytes);
        for _ in 0..64 {
            if step(&mut kernel, &memory, &mut input, heap).is_none() {
                break;
            }
        }
        kernel.table.clear();
        kernel.layers.delete();
    }

    fn step(
        kernel: &mut Kernel,
        memory: &GuestMemory,
        input: &mut Input<'_>,
        heap: u64,
    ) -> Option<()> {
        let number = match input.byte()? {
            // Something is put where a call will look.
            255 => {
                let at = input.argument(heap)?;
                let word = input.word()?;
                let _not_there = memory.write(at, &word.to_le_bytes());
                return Some(());
            }
            254 => u64::from(input.byte()?) + 200,
            number => u64::from(number),
        };
        let mut args = [0; 6];
        for arg in &mut args {
            *arg = input.argument(heap)?;
        }
        match kernel.call(memory, Call { number, args }) {
            Outcome::End(_) | Outcome::Fork { .. } | Outcome::Snapshot => {}
            Outcome::Execute(execute) => kernel.become_program(&execute),
            Outcome::SignalReturn => {
                let mut regs = kvm_bindings::kvm_regs {
                    rsp: args[0],
                    ..Default::default()
                };
                let _no_frame = kernel.signals.leave(memory, &mut regs);
            }
            Outcome::Interrupted => kernel.signals.raise_all(interrupt::take()),
            Outcome::Value(_) => {}
        }
        if kernel.signals.any() {
            let mut regs = kvm_bindings::kvm_regs {
                rsp: heap + 0x8000,
                ..Default::default()
            };
            let _ended = kernel.signals.deliver(memory, &mut regs);
        }
        Some(())
    }
}
