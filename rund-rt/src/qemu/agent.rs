//! The guest's first process behind the point of the snapshot, and what it is told.
//!
//! It is a program of half a kilobyte, without a shell: what runs in a clone is translated anew by
//! an emulated processor, and every program that a script would start costs 10 ms of that.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::{Error, Result};

/// Where the program is loaded.
const BASE: u64 = 0x40_0000;
/// An ELF header and one program header.
const HEADERS: u64 = 64 + 56;
/// Where it puts what it is told.
const BLOCK: u64 = 0x1000_0000;
/// Offsets into that, as `agent.s` has them; behind them lies what they point to.
const HOST_NAME: usize = 0;
const NOW: usize = 16;
const ENTROPY: usize = 32;
const CWD: usize = 72;
const PATHS: usize = 80;
const ARGV: usize = 88;
const ENVP: usize = 96;
const INPUT: usize = 104;
const END: usize = 120;
const FIELDS: usize = 136;
/// The longest name that a host may have (`__NEW_UTS_LEN`).
const LONGEST_NAME: usize = 64;
/// Where programs are looked for without a `PATH`.
const DEFAULT_PATH: &[u8] = b"/bin:/usr/bin";

#[cfg(target_arch = "x86_64")]
core::arch::global_asm!(include_str!("agent.s"));

/// The program as a static ELF file.
///
/// # Errors
/// Where this library was not built for x86-64: it is in its own machine's code.
#[cfg(target_arch = "x86_64")]
pub(super) fn program() -> Result<Vec<u8>> {
    unsafe extern "C" {
        static rund_rt_agent_start: u8;
        static rund_rt_agent_end: u8;
    }
    let start = &raw const rund_rt_agent_start;
    let len = (&raw const rund_rt_agent_end).addr() - start.addr();
    // SAFETY: start and end are labels around the same constant bytes of this program.
    let code = unsafe { std::slice::from_raw_parts(start, len) };
    Ok(elf(code))
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn program() -> Result<Vec<u8>> {
    Err(Error::Unavailable {
        backend: super::BACKEND,
        why: "its guests are x86-64, and so has this library to be".to_owned(),
        fix: "build it for x86_64-unknown-linux-gnu",
    })
}

#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code))]
fn elf(code: &[u8]) -> Vec<u8> {
    let size = HEADERS + code.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    let half = |elf: &mut Vec<u8>, value: u16| elf.extend(value.to_le_bytes());
    let word = |elf: &mut Vec<u8>, value: u32| elf.extend(value.to_le_bytes());
    let long = |elf: &mut Vec<u8>, value: u64| elf.extend(value.to_le_bytes());
    half(&mut elf, 2); // ET_EXEC
    half(&mut elf, 62); // EM_X86_64
    word(&mut elf, 1);
    long(&mut elf, BASE + HEADERS); // entry
    long(&mut elf, 64); // program headers
    long(&mut elf, 0);
    word(&mut elf, 0);
    for value in [64, 56, 1, 0, 0, 0] {
        half(&mut elf, value);
    }
    word(&mut elf, 1); // PT_LOAD
    word(&mut elf, 5); // read, execute
    for value in [0, BASE, BASE, size, size, 0x1000] {
        long(&mut elf, value);
    }
    elf.extend(code);
    elf
}

/// What a clone has of its own.
pub(super) struct Identity<'a> {
    pub(super) id: &'a str,
    pub(super) seed: [u8; 32],
    /// Since 1970.
    pub(super) now: std::time::Duration,
    pub(super) args: &'a [OsString],
    pub(super) env: &'a [OsString],
    pub(super) cwd: &'a Path,
    pub(super) input: &'a [u8],
    /// What the guest says before its exit code.
    pub(super) end: &'a [u8],
}

impl Identity<'_> {
    /// What is sent to the guest behind the mark.
    ///
    /// # Errors
    /// Where there is no program to start, or a word has a zero in it.
    pub(super) fn message(&self) -> Result<Vec<u8>> {
        let name = self.args.first().ok_or_else(|| bad("there is none"))?;
        let mut block = Block::new();
        let host_name: Vec<u8> = self
            .id
            .bytes()
            .filter(|byte| !byte.is_ascii_control())
            .take(LONGEST_NAME)
            .collect();
        block.text(HOST_NAME, &host_name);
        block.number(NOW, self.now.as_secs());
        block.number(NOW + 8, self.now.subsec_nanos().into());
        // struct rand_pool_info: bits, bytes, and those.
        block.number(ENTROPY, 256 | (32 << 32));
        block.put(ENTROPY + 8, &self.seed);
        let cwd = block.word(self.cwd.as_os_str().as_bytes())?;
        block.number(CWD, cwd);
        let paths = paths(name.as_bytes(), self.env);
        block.words(PATHS, paths.iter().map(Vec::as_slice))?;
        block.words(ARGV, self.args.iter().map(|word| word.as_bytes()))?;
        block.words(ENVP, self.env.iter().map(|word| word.as_bytes()))?;
        block.text(INPUT, self.input);
        block.text(END, self.end);
        let mut message = (block.bytes.len() as u64).to_le_bytes().to_vec();
        message.append(&mut block.bytes);
        Ok(message)
    }
}

fn bad(why: &str) -> Error {
    Error::BadSetting {
        what: "the guest's command",
        why: why.to_owned(),
    }
}

/// The files that a program's name may mean, in the order in which they are tried.
fn paths(name: &[u8], env: &[OsString]) -> Vec<Vec<u8>> {
    if name.contains(&b'/') {
        return vec![name.to_vec()];
    }
    let path = env
        .iter()
        .find_map(|word| word.as_bytes().strip_prefix(b"PATH="))
        .unwrap_or(DEFAULT_PATH);
    path.split(|byte| *byte == b':')
        .map(|folder| match folder {
            // The working directory, as for a shell.
            b"" => name.to_vec(),
            folder => [folder, b"/", name].concat(),
        })
        .collect()
}

/// Bytes that will lie at [`BLOCK`].
struct Block {
    bytes: Vec<u8>,
}

impl Block {
    fn new() -> Self {
        Self {
            bytes: vec![0; FIELDS],
        }
    }

    /// Where the next byte will lie.
    fn here(&self) -> u64 {
        BLOCK + self.bytes.len() as u64
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.bytes.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    fn number(&mut self, at: usize, number: u64) {
        self.put(at, &number.to_le_bytes());
    }

    /// Bytes, with their address and length in a field.
    fn text(&mut self, field: usize, bytes: &[u8]) {
        self.number(field, self.here());
        self.number(field + 8, bytes.len() as u64);
        self.bytes.extend(bytes);
    }

    /// A word with a zero at its end; its address.
    fn word(&mut self, word: &[u8]) -> Result<u64> {
        if word.contains(&0) {
            return Err(bad("a word has a zero in it"));
        }
        let here = self.here();
        self.bytes.extend(word);
        self.bytes.push(0);
        Ok(here)
    }

    /// A list of words, with its address in a field.
    fn words<'a>(&mut self, field: usize, words: impl IntoIterator<Item = &'a [u8]>) -> Result<()> {
        let mut list = Vec::new();
        for word in words {
            list.push(self.word(word)?);
        }
        list.push(0);
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        self.number(field, self.here());
        for address in list {
            self.bytes.extend(address.to_le_bytes());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{BLOCK, Identity, paths, program};
    use std::path::Path;

    fn identity<'a>(args: &'a [std::ffi::OsString]) -> Identity<'a> {
        Identity {
            id: "one\n",
            seed: [7; 32],
            now: std::time::Duration::from_secs(5),
            args,
            env: &[],
            cwd: Path::new("/"),
            input: b"in",
            end: b"end",
        }
    }

    #[test]
    fn pointers_lead_to_what_they_should() {
        let args = ["/bin/a".into(), "b c".into()];
        let message = identity(&args).message().unwrap();
        let (length, block) = message.split_at(8);
        assert_eq!(length, (block.len() as u64).to_le_bytes());
        let long = |at: usize| u64::from_le_bytes(block[at..at + 8].try_into().unwrap());
        let at = |address: u64| usize::try_from(address - BLOCK).unwrap();
        let word = |address| {
            let rest = &block[at(address)..];
            &rest[..rest.iter().position(|byte| *byte == 0).unwrap()]
        };
        assert_eq!((&block[at(long(0))..][..3], long(8)), (&b"one"[..], 3));
        assert_eq!((long(16), long(24)), (5, 0));
        assert_eq!(word(long(72)), b"/");
        let argv = at(long(88));
        assert_eq!(argv % 8, 0);
        assert_eq!(word(long(argv)), b"/bin/a");
        assert_eq!(word(long(argv + 8)), b"b c");
        assert_eq!((long(argv + 16), long(at(long(96)))), (0, 0));
        assert_eq!((&block[at(long(104))..][..2], long(112)), (&b"in"[..], 2));
        assert_eq!((&block[at(long(120))..][..3], long(128)), (&b"end"[..], 3));
    }

    #[test]
    fn a_command_that_cannot_be_said_is_refused() {
        assert!(identity(&[]).message().is_err());
        assert!(identity(&["a\0b".into()]).message().is_err());
    }

    #[test]
    fn programs_are_looked_for_in_the_path() {
        assert_eq!(paths(b"./a", &[]), [b"./a"]);
        assert_eq!(paths(b"a", &[]), [&b"/bin/a"[..], b"/usr/bin/a"]);
        let env = ["X=1".into(), "PATH=/x::/y".into()];
        assert_eq!(paths(b"a", &env), [&b"/x/a"[..], b"a", b"/y/a"]);
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_program_runs_and_is_nobody_but_a_first_process() {
        use std::os::unix::fs::PermissionsExt;
        use std::process::{Command, Stdio};

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        std::fs::write(&path, program().unwrap()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let done = Command::new(path).stdin(Stdio::null()).output().unwrap();
        assert_eq!((done.status.code(), &done.stdout[..]), (Some(1), &b""[..]));
    }
}
