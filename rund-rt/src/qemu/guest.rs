//! The guest's side: an initial file system with an init that stops at the point of the snapshot,
//! and what the host tells each clone behind it, over the serial line.

use std::fmt::Write as _;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use carlsbad_types::ByteSize;

use super::reseed;
use crate::error::{Error, Result};

/// What the guest says when it is to be saved.
pub(super) const READY: &[u8] = b"RUND-READY";
/// What it says before the program's output, and, with the exit code, behind it.
pub(super) const BEGIN: &[u8] = b"RUND-BEGIN\n";
pub(super) const END: &[u8] = b"\nRUND-END ";

/// The guest's first process. It ends by a reset, which ends QEMU: without ACPI there is no power to
/// switch off. All that differs between clones comes behind the mark: a name, the
/// time, and entropy, without which every clone would draw the same random numbers.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty raw -echo
echo RUND-READY
read -r id
read -r seed
read -r now
read -r length
read -r command
hostname "$id"
echo "$seed" | xxd -r -p | /bin/reseed
date -s "@$now" > /dev/null
printf "$command" > /command
echo RUND-BEGIN
if [ "$length" = 0 ]; then
    sh /command < /dev/null
else
    head -c "$length" > /input
    sh /command < /input
fi
code=$?
echo
echo "RUND-END $code"
reboot -f
"#;

/// The initial file system of a Linux guest in the backend `qemu`: busybox, and an init that waits
/// where a template is saved.
///
/// `busybox` is a static busybox; `files` are more files, by their path inside. The kernel needs
/// its serial console and devtmpfs built in, as Debian's cloud kernel has them.
///
/// # Errors
/// Where a file cannot be read.
pub fn initramfs(busybox: &Path, files: &[(&Path, &Path)]) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for name in ["bin", "dev", "proc", "sys", "tmp"] {
        archive.add(name.as_bytes(), 0o040_755, &[]);
    }
    let read = |path: &Path| std::fs::read(path).map_err(Error::io("read", path));
    archive.add(b"bin/busybox", 0o100_755, &read(busybox)?);
    archive.add(b"init", 0o100_755, INIT.as_bytes());
    archive.add(b"bin/reseed", 0o100_755, &reseed::program());
    for (inside, host) in files {
        let name = inside.strip_prefix("/").unwrap_or(inside);
        archive.add(name.as_os_str().as_bytes(), 0o100_755, &read(host)?);
    }
    Ok(archive.finish())
}

/// A `cpio` archive in the format `newc` (Documentation/driver-api/early-userspace/buffer-format).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn add(&mut self, name: &[u8], mode: u32, body: &[u8]) {
        self.inode += 1;
        let mut header = String::from("070701");
        let fields = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            u32::try_from(body.len()).unwrap_or(u32::MAX),
            0,
            0,
            0,
            0,
            u32::try_from(name.len() + 1).unwrap_or(u32::MAX),
            0,
        ];
        for field in fields {
            // Into a string nothing fails.
            let _written = write!(header, "{field:08x}");
        }
        self.bytes.extend(header.as_bytes());
        self.bytes.extend(name);
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(body);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add(b"TRAILER!!!", 0, &[]);
        self.bytes
    }
}

/// What a clone has of its own.
pub(super) struct Identity<'a> {
    pub(super) id: &'a str,
    pub(super) seed: [u8; 32],
    /// Seconds since 1970.
    pub(super) now: u64,
    pub(super) args: &'a [std::ffi::OsString],
    pub(super) env: &'a [std::ffi::OsString],
    pub(super) cwd: &'a Path,
    pub(super) input: &'a [u8],
}

impl Identity<'_> {
    /// What is sent to the guest behind the mark.
    pub(super) fn lines(&self) -> Vec<u8> {
        let mut lines = String::new();
        let hex: String = self.seed.iter().fold(String::new(), |mut hex, byte| {
            let _written = write!(hex, "{byte:02x}");
            hex
        });
        // An id with a line's end in it would be two lines.
        let id: String = self.id.chars().filter(|one| !one.is_control()).collect();
        let _written = writeln!(lines, "{id}\n{hex}\n{}\n{}", self.now, self.input.len());
        for byte in self.command() {
            let _written = write!(lines, "\\{byte:03o}");
        }
        lines.push('\n');
        let mut bytes = lines.into_bytes();
        bytes.extend(self.input);
        bytes
    }

    /// A line for the guest's shell.
    fn command(&self) -> Vec<u8> {
        let mut command = b"cd ".to_vec();
        quote(self.cwd.as_os_str().as_bytes(), &mut command);
        command.extend(b" && exec env -i");
        for word in self.env.iter().chain(self.args) {
            command.push(b' ');
            quote(word.as_bytes(), &mut command);
        }
        command
    }
}

/// For a shell: in single quotes, inside of which nothing is special but they themselves.
fn quote(word: &[u8], into: &mut Vec<u8>) {
    into.push(b'\'');
    for byte in word {
        match byte {
            b'\'' => into.extend(br"'\''"),
            byte => into.push(*byte),
        }
    }
    into.push(b'\'');
}

/// A program's output as it comes over the serial line.
#[derive(Debug, Default)]
pub(super) struct Transcript {
    seen: Vec<u8>,
    begun: bool,
    /// No more than so much of it is kept.
    most: usize,
    dropped: bool,
}

impl Transcript {
    pub(super) fn new(most: ByteSize) -> Self {
        Self {
            most: usize::try_from(most.get()).unwrap_or(usize::MAX),
            ..Self::default()
        }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.seen.extend(bytes);
        if !self.begun
            && let Some(at) = find(&self.seen, BEGIN)
        {
            self.seen.drain(..at + BEGIN.len());
            self.begun = true;
        }
        // The end's mark is in the last few bytes, which are always kept.
        let tail = END.len() + 16;
        if self.begun && self.seen.len() > self.most.saturating_add(2 * tail) {
            let from = self.seen.len() - tail;
            self.seen.drain(self.most..from);
            self.dropped = true;
        }
    }

    /// The output, the exit code where the guest said one, and whether output was dropped.
    pub(super) fn finish(mut self) -> (Vec<u8>, Option<i32>, bool) {
        let Some(at) = find_last(&self.seen, END) else {
            if !self.begun {
                self.seen.clear();
            }
            return (self.seen, None, self.dropped);
        };
        // The kernel may have a last word behind it.
        let code = std::str::from_utf8(&self.seen[at + END.len()..])
            .ok()
            .and_then(|text| text.lines().next()?.trim().parse().ok());
        self.seen.truncate(at);
        let dropped = self.dropped || self.seen.len() > self.most;
        self.seen.truncate(self.most);
        (self.seen, code, dropped)
    }
}

pub(super) fn find(bytes: &[u8], mark: &[u8]) -> Option<usize> {
    bytes.windows(mark.len()).position(|window| window == mark)
}

fn find_last(bytes: &[u8], mark: &[u8]) -> Option<usize> {
    bytes.windows(mark.len()).rposition(|window| window == mark)
}

/// Reads the console up to the mark; else what was said instead.
pub(super) fn read_until_ready(mut console: impl Read) -> std::result::Result<(), String> {
    let mut seen = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        match console.read(&mut chunk) {
            Ok(0) | Err(_) => {
                let text = String::from_utf8_lossy(&seen);
                let last: Vec<_> = text.lines().rev().take(3).collect();
                return Err(format!("its console ended with {last:?}"));
            }
            Ok(n) => seen.extend(&chunk[..n]),
        }
        if find(&seen, READY).is_some() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Archive, Transcript, quote};
    use carlsbad_types::ByteSize;

    #[test]
    fn output_is_between_the_marks() {
        let mut transcript = Transcript::new(ByteSize::kib(1));
        for part in [
            "noise\nRUND-BE",
            "GIN\nhello\nRUND-END is said\n",
            "\nRUND-END 3\n",
        ] {
            transcript.push(part.as_bytes());
        }
        let (output, code, dropped) = transcript.finish();
        assert_eq!(output, b"hello\nRUND-END is said\n");
        assert_eq!((code, dropped), (Some(3), false));
    }

    #[test]
    fn too_much_output_is_dropped_and_the_code_is_not() {
        let mut transcript = Transcript::new(ByteSize::new(4));
        transcript.push(b"RUND-BEGIN\n");
        for _ in 0..100 {
            transcript.push(b"0123456789");
        }
        transcript.push(b"\nRUND-END 0\n");
        let (output, code, dropped) = transcript.finish();
        assert_eq!((&output[..], code, dropped), (&b"0123"[..], Some(0), true));
    }

    #[test]
    fn words_are_quoted_for_a_shell() {
        let mut quoted = Vec::new();
        quote(b"it's $x", &mut quoted);
        assert_eq!(quoted, br"'it'\''s $x'");
    }

    #[test]
    fn archives_are_aligned() {
        let mut archive = Archive::default();
        archive.add(b"a", 0o100_644, b"x");
        let bytes = archive.finish();
        assert!(bytes.len().is_multiple_of(4));
        assert_eq!(&bytes[..6], b"070701");
    }
}
