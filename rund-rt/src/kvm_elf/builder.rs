//! Making a template: the program is loaded and runs to the point at which it is saved.

use std::cell::RefCell;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;

use carlsbad_types::ByteSize;
use kvm_bindings::kvm_regs;

use crate::backend::{SnapshotPoint, Status};

use super::calls::account::Account;
use super::calls::children::Children;
use super::calls::layers::{Layers, duplicate};
use super::calls::output::{Outputs, Sink};
use super::calls::path::file_name;
use super::calls::process::{Identity, joined};
use super::calls::signal::Signals;
use super::calls::space::Space;
use super::calls::table::{Open, Table};
use super::calls::{Kernel, Program};
use super::elf::{self, LoadPlan, Segment};
use super::file_layout::pages_with_something;
use super::guest::{Contents, End, Guest, Image};
use super::interrupt;
use super::layout::PAGE;
use super::machine::{Host, Machine, Stop};
use super::memory::Extent;
use super::shim::{self, Return, data};
use super::template::{Process, SavedOpen, State};
use super::window::Windows;
use super::wire::{Build, Failure};
use super::zygote::Surroundings;

/// Finds out at which privilege the entry of a system call runs here, by making one.
///
/// # Errors
/// Where no machine can be made, or it does not run.
pub fn probe(host: &Host) -> Result<Return, String> {
    // syscall; ud2
    let code = [0x0f, 0x05, 0x0f, 0x0b];
    let plan = LoadPlan {
        entry: super::layout::PIE_BASE,
        headers: 0,
        header_size: 0,
        header_count: 0,
        segments: vec![Segment {
            address: super::layout::PIE_BASE,
            len: PAGE,
            file_offset: 0,
            file_len: code.len() as u64,
            write: false,
            execute: true,
        }],
    };
    let layout = super::layout::Layout::new(&plan, ByteSize::mib(32))?;
    let image = Image { plan, layout };
    let (memory, root) = image.load(&Contents::Bytes(&code), Return::Sysret)?;
    let mut machine =
        Machine::new(host, &memory, root, Return::Sysret).map_err(|why| why.to_string())?;
    *machine.regs() = kvm_regs {
        rip: image.plan.entry,
        rsp: image.layout.stack.end(),
        rflags: 2,
        // A number that no call has.
        rax: u64::from(u32::MAX),
        ..Default::default()
    };
    let stop = machine.run();
    if stop != Stop::Call {
        return Err(format!("the first system call did not come: {stop:?}"));
    }
    let sregs = machine.sregs().map_err(|why| why.to_string())?;
    Ok(if sregs.cs.dpl == 3 {
        Return::Jump
    } else {
        Return::Sysret
    })
}

/// What a process begins with.
pub fn new_kernel(
    program: Program,
    path: &[u8],
    space: Space,
    layers: Layers,
    account: &'static Account,
    sink: Sink,
) -> Kernel {
    let mut kernel = Kernel {
        table: Table::default(),
        layers,
        outputs: Outputs::new(&account.output, sink),
        cwd: b"/".to_vec(),
        umask: 0o022,
        identity: Identity::default(),
        space,
        signals: Signals::default(),
        program,
        program_path: path.to_vec(),
        name: [0; 16],
        children: Children::default(),
        account,
        relatives: false,
        snapshot: None,
        draws: 0,
    };
    kernel.set_name(file_name(path));
    kernel
}

/// Makes a template in `file`.
///
/// # Errors
/// Why there is none.
pub fn build(
    surroundings: &Surroundings,
    build: Build,
    program: &OwnedFd,
    file: &OwnedFd,
) -> Result<State, Failure> {
    let other = |why: String| Failure::Other(why);
    let bytes = read_all(program).map_err(|why| Failure::Program(why.to_string()))?;
    let head = bytes.get(..elf::HEAD as usize).unwrap_or(&bytes);
    let plan = elf::plan(head, bytes.len() as u64).map_err(Failure::Program)?;
    let image = Image::new(plan, ByteSize::new(build.memory)).map_err(Failure::Program)?;
    // Copied: what is saved is what lies in memory, which a page that nobody has touched does not.
    let (memory, root) = image
        .load(&Contents::Bytes(&bytes), surroundings.way_back)
        .map_err(Failure::Program)?;
    let space = Space::new(&image.layout);
    let said = Rc::new(RefCell::new(Vec::new()));
    let sink = {
        let said = Rc::clone(&said);
        Box::new(move |stream: u8, bytes: &[u8]| {
            if stream == 2 {
                said.borrow_mut().extend_from_slice(bytes);
            }
            true
        })
    };
    let lower = match &surroundings.lower {
        Some(lower) => Some(duplicate(lower.as_raw_fd()).map_err(|why| other(why.to_string()))?),
        None => None,
    };
    let account = Account::new().map_err(|why| other(format!("shared memory: {why}")))?;
    // What it says is only for an error, and it is one process.
    account.begin(64 << 10, 1);
    let mut kernel = new_kernel(
        Program {
            fd: Rc::new(program.try_clone().map_err(|why| other(why.to_string()))?),
            offset: 0,
            len: bytes.len() as u64,
            changes: true,
            held: None,
        },
        &build.program_path,
        space,
        Layers::new(lower, None),
        account,
        sink,
    );
    kernel.enter(&build.cwd).map_err(Failure::Program)?;
    kernel.snapshot = Some(build.snapshot);
    kernel.identity.pid = 1;
    kernel.identity.host_name = "template".into();
    kernel.identity.arguments = joined(&build.args);
    standard(&mut kernel.table).map_err(|why| other(why.to_string()))?;

    let machine = Machine::new(&surroundings.host, &memory, root, surroundings.way_back)
        .map_err(|why| Failure::Kvm(why.to_string()))?;
    let mut guest = Guest {
        machine,
        memory,
        kernel,
        image,
        root,
        unused_tables: 0,
        tables_overwritten: false,
        host: Rc::clone(&surroundings.host),
        way_back: surroundings.way_back,
        windows: Windows::default(),
        exits: 0,
        is_template: false,
        is_child: false,
        report: None,
    };
    let mut registers = None;
    let mut marks = (
        guest.image.layout.heap.address,
        guest.image.layout.mmap.address,
    );
    if build.snapshot != SnapshotPoint::Entry {
        guest
            .begin(&build.args, &build.env, &build.program_path)
            .map_err(|why| Failure::Program(why.to_string()))?;
        // The bytes of AT_RANDOM, of which the C library makes its canaries.
        guest.kernel.draws += 1;
        interrupt::install().map_err(|why| other(why.to_string()))?;
        interrupt::set(Some(build.deadline));
        let end = guest.run();
        interrupt::stop();
        if end != End::Snapshot {
            guest.kernel.outputs.flush();
            let words = String::from_utf8_lossy(&said.borrow()).trim().to_owned();
            return Err(Failure::Snapshot(match end {
                End::Status(Status::TimedOut) => "its time was over".into(),
                End::Status(status) if words.is_empty() => format!("it ended with {status}"),
                End::Status(status) => format!("it ended with {status}: {words}"),
                other => format!("{other:?}: {words}"),
            }));
        }
        let mut saved = guest.machine.save().map_err(|why| other(why.to_string()))?;
        // Each clone makes the call anew.
        saved.regs.rip = shim::exit_address();
        registers = Some(saved);
        marks = (
            guest.memory.data(data::BRK + 8),
            guest.memory.data(data::MMAP),
        );
    }
    let process = process(&guest, marks).map_err(Failure::Snapshot)?;
    let ranges = pages_with_something(&guest.memory);
    let (extents, end) =
        write_pages(&guest, &ranges, file).map_err(|why| other(format!("the pages: {why}")))?;
    let program = &guest.kernel.program;
    let bytes = program
        .bytes(0, program.len)
        .map_err(|why| other(format!("the program: {why}")))?;
    write_at(file, end, &bytes).map_err(|why| other(format!("the program: {why}")))?;
    let len = (end + bytes.len() as u64).next_multiple_of(PAGE);
    nix::unistd::ftruncate(file, len as i64).map_err(|why| other(why.to_string()))?;
    Ok(State {
        processor: surroundings.host.processor(),
        sysret: surroundings.way_back == Return::Sysret,
        memory: guest.image.layout.memory,
        plan: guest.image.plan.clone(),
        root: guest.root,
        extents,
        program: (end, bytes.len() as u64),
        program_path: guest.kernel.program_path.clone(),
        snapshot: build.snapshot,
        registers,
        args: build.args,
        env: build.env,
        cwd: guest.kernel.cwd.clone(),
        process,
    })
}

/// No input, captured output.
fn standard(table: &mut Table) -> nix::Result<()> {
    table.open(Open::Null, false)?;
    table.open(Open::Captured(1), false)?;
    table.open(Open::Captured(2), false)?;
    Ok(())
}

/// What is saved of what Linux knew.
fn process(guest: &Guest, marks: (u64, u64)) -> Result<Process, String> {
    let kernel = &guest.kernel;
    if kernel.relatives {
        return Err("it has made other processes".into());
    }
    let mut open: Vec<(u64, SavedOpen, bool)> = Vec::new();
    for (fd, shared) in kernel.table.iter() {
        let close = kernel.table.slot(fd).is_ok_and(|slot| slot.close_on_exec);
        let first = kernel
            .table
            .iter()
            .find(|(_, other)| Rc::ptr_eq(shared, other))
            .map_or(fd, |(first, _)| first);
        if fd < 3 && first == fd {
            continue;
        }
        let saved = if first < fd {
            SavedOpen::Same(first)
        } else {
            match &*shared.borrow() {
                Open::Null => SavedOpen::Null,
                Open::Zero => SavedOpen::Zero,
                Open::Random => SavedOpen::Random,
                Open::Directory(listing) => SavedOpen::Directory(listing.path.clone()),
                Open::Host(file) if file.regular && !file.upper => {
                    // SAFETY: a descriptor of ours.
                    let at = unsafe { libc::lseek(file.fd.as_raw_fd(), 0, libc::SEEK_CUR) };
                    SavedOpen::File(file.path.clone(), at.max(0) as u64)
                }
                _ => return Err(format!("its descriptor {fd} cannot be saved")),
            }
        };
        open.push((fd, saved, close));
    }
    Ok(Process {
        space: kernel.space.clone(),
        marks,
        signals: kernel.signals.clone(),
        umask: kernel.umask,
        name: kernel.name,
        open,
        draws: kernel.draws,
    })
}

/// Writes the pages in `ranges` one after the other; gives where each went, and their end.
fn write_pages(
    guest: &Guest,
    ranges: &[(u64, u64)],
    file: &OwnedFd,
) -> nix::Result<(Vec<Extent>, u64)> {
    let mut at = 0;
    let mut extents = Vec::new();
    for (from, to) in ranges {
        let len = to - from;
        let mut bytes = vec![0; len as usize];
        guest.memory.read_offset(*from, &mut bytes);
        write_at(file, at, &bytes)?;
        extents.push(Extent {
            offset: *from,
            file_offset: at,
            len,
        });
        at += len;
    }
    Ok((extents, at))
}

fn write_at(file: &OwnedFd, offset: u64, bytes: &[u8]) -> nix::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let at = offset as i64 + done as i64;
        done += nix::sys::uio::pwrite(file.as_fd(), &bytes[done..], at)?;
    }
    Ok(())
}

fn read_all(file: &OwnedFd) -> nix::Result<Vec<u8>> {
    let len = nix::sys::stat::fstat(file)?.st_size;
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    let mut done = 0;
    while done < bytes.len() {
        match nix::sys::uio::pread(file.as_fd(), &mut bytes[done..], done as i64)? {
            0 => break,
            n => done += n,
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}
