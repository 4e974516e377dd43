//! A machine that is saved too early: before its kernel has patched its own text. It is what the
//! backend does not do, and is driven here by hand.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

const MEMORY: u64 = 128 << 20;
const PATIENCE: Duration = Duration::from_secs(120);
const PAGE: u64 = 4096;
/// Where the kernel's text is mapped (Documentation/x86/x86_64/mm.rst).
const TEXT_MAPPING: u64 = 0xffff_ffff_8000_0000;

/// A kernel's symbols.
pub(crate) struct Symbols(HashMap<String, u64>);

impl Symbols {
    pub(crate) fn beside(kernel: &Path) -> Self {
        let text = fs::read_to_string(kernel.with_file_name("System.map")).unwrap();
        let symbols = text.lines().map(|line| {
            let words: Vec<_> = line.split(' ').collect();
            (
                words[2].to_owned(),
                u64::from_str_radix(words[0], 16).unwrap(),
            )
        });
        Self(symbols.collect())
    }

    pub(crate) fn get(&self, name: &str) -> u64 {
        self.0[name]
    }

    /// Pages of the kernel's text that a process has of its own, and how many there are. `memory` is
    /// what the guest's memory is called among its mappings.
    pub(crate) fn private_text(&self, pid: u32, memory: &str) -> (usize, usize) {
        let physical = |name| self.get(name) - TEXT_MAPPING;
        let (first, end) = (physical("_text") / PAGE, physical("_etext").div_ceil(PAGE));
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let line = maps.lines().find(|line| line.contains(memory)).unwrap();
        let start = u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
        let pagemap = fs::File::open(format!("/proc/{pid}/pagemap")).unwrap();
        let mut entries = vec![0; usize::try_from((end - first) * 8).unwrap()];
        let at = (start / PAGE + first) * 8;
        std::os::unix::fs::FileExt::read_exact_at(&pagemap, &mut entries, at).unwrap();
        let entries = entries.as_chunks().0;
        let is_own = |entry: &&[u8; 8]| {
            // Present or swapped, and no page of the file's (pagemap.rst).
            let entry = u64::from_ne_bytes(**entry);
            entry & 1 << 62 != 0 || entry >> 63 == 1 && entry & 1 << 61 == 0
        };
        (entries.iter().filter(is_own).count(), entries.len())
    }
}

/// A QEMU with a monitor and a debugger's socket.
pub(crate) struct Machine {
    pub(crate) child: Child,
    monitor: BufReader<UnixStream>,
    dir: PathBuf,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}

fn connect(socket: &Path) -> UnixStream {
    let start = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                return stream;
            }
            Err(why) => assert!(start.elapsed() < PATIENCE, "{why}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Machine {
    /// With its memory in `dir`. One that boots is stopped before its first instruction.
    fn start(dir: &Path, boots: Option<(&Path, &Path)>) -> Self {
        let memory = dir.join("memory");
        let (share, kind) = if boots.is_some() {
            fs::File::create(&memory).unwrap().set_len(MEMORY).unwrap();
            ("on", "boots")
        } else {
            ("off", "clone")
        };
        let socket = |name: &str| dir.join(format!("{kind}-{name}"));
        let unix = |path: &Path| format!("unix:{},server=on,wait=off", path.display());
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-M", "microvm,acpi=off,memory-backend=m"])
            .args(["-accel", "tcg", "-cpu", "max", "-m", "128M"])
            .arg("-object")
            .arg(format!(
                "memory-backend-file,id=m,size={MEMORY},mem-path={},share={share}",
                memory.display()
            ))
            .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
            .args(["-serial", "stdio"])
            .args(["-qmp", &unix(&socket("qmp")), "-gdb", &unix(&socket("gdb"))]);
        match boots {
            Some((kernel, initramfs)) => {
                let words = "console=ttyS0,115200 quiet reboot=t panic=-1 random.trust_cpu=on";
                qemu.args(["-S", "-append", words]);
                qemu.arg("-kernel")
                    .arg(kernel)
                    .arg("-initrd")
                    .arg(initramfs)
            }
            None => qemu.args(["-incoming", "defer"]),
        };
        let child = qemu
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut machine = Self {
            child,
            monitor: BufReader::new(connect(&socket("qmp"))),
            dir: dir.to_owned(),
        };
        machine.ask("qmp_capabilities", &json!({}));
        let ignore = json!([{"capability": "x-ignore-shared", "state": true}]);
        machine.ask(
            "migrate-set-capabilities",
            &json!({ "capabilities": ignore }),
        );
        machine
    }

    fn ask(&mut self, command: &str, arguments: &Value) -> Value {
        let asked = json!({"execute": command, "arguments": arguments}).to_string();
        self.monitor.get_mut().write_all(asked.as_bytes()).unwrap();
        loop {
            let mut line = String::new();
            assert_ne!(self.monitor.read_line(&mut line).unwrap(), 0);
            let mut said: Value = serde_json::from_str(&line).unwrap();
            assert!(said.get("error").is_none(), "{command}: {line}");
            if said.get("return").is_some() {
                return said["return"].take();
            }
        }
    }

    fn move_state(&mut self, command: &str, how: &str) {
        let uri = format!("exec:cat {how} {}", self.dir.join("state").display());
        self.ask(command, &json!({ "uri": uri }));
        let start = Instant::now();
        while self.ask("query-migrate", &json!({}))["status"] != "completed" {
            assert!(start.elapsed() < PATIENCE);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Boots a kernel to the instruction at `address`, saves the machine there, and has a clone of
    /// it go on until its init is ready.
    pub(crate) fn cloned_at(dir: &Path, kernel: &Path, initramfs: &Path, address: u64) -> Self {
        let mut early = Self::start(dir, Some((kernel, initramfs)));
        let mut debugger = connect(&dir.join("boots-gdb"));
        debug(&mut debugger, &format!("Z1,{address:x},1"), "OK");
        debug(&mut debugger, "c", "T05");
        early.move_state("migrate", ">");
        drop(early);
        say_it_had_paused(&dir.join("state"));
        let mut clone = Self::start(dir, None);
        clone.move_state("migrate-incoming", "<");
        clone.ask("cont", &json!({}));
        let mut output = clone.child.stdout.take().unwrap();
        let (mut seen, mut chunk) = (Vec::new(), [0; 4096]);
        while !seen.windows(10).any(|part| part == b"RUND-READY") {
            let n = output.read(&mut chunk).unwrap();
            assert_ne!(n, 0, "{}", String::from_utf8_lossy(&seen));
            seen.extend(&chunk[..n]);
        }
        clone.child.stdout = Some(output);
        clone
    }
}

/// A machine that a debugger had stopped is not allowed to go on elsewhere: changes what its state
/// says of that (a length, and a name in a field of 100 bytes).
fn say_it_had_paused(state: &Path) {
    let (debug, paused) = (b"\0\0\0\x06debug\0\0", b"\0\0\0\x07paused\0");
    let mut bytes = fs::read(state).unwrap();
    let places: Vec<_> = (0..bytes.len() - debug.len())
        .filter(|at| bytes[*at..].starts_with(debug))
        .collect();
    assert_eq!(places.len(), 1);
    bytes[places[0]..][..paused.len()].copy_from_slice(paused);
    fs::write(state, bytes).unwrap();
}

/// Asks a debugger's stub (GDB remote serial protocol) until it answers `wanted`.
fn debug(stub: &mut UnixStream, packet: &str, wanted: &str) {
    let sum = packet.bytes().fold(0u8, u8::wrapping_add);
    stub.write_all(format!("${packet}#{sum:02x}").as_bytes())
        .unwrap();
    let (mut seen, mut byte) = (String::new(), [0]);
    while !seen.contains(&format!("${wanted}")) || !seen[..seen.len() - 2].ends_with('#') {
        stub.read_exact(&mut byte).unwrap();
        seen.push(char::from(byte[0]));
    }
    stub.write_all(b"+").unwrap();
}
