//! The one thing that a shell cannot tell a kernel: to use new entropy at once. Two clones of a
//! template have the same random number generator; what is written to `/dev/urandom` is mixed in,
//! but used a minute later at the earliest (drivers/char/random.c). A program of 107 bytes asks for
//! it now.

/// Where the program is loaded.
const BASE: u64 = 0x40_0000;
/// An ELF header and one program header.
const HEADERS: u64 = 64 + 56;

/// Reads 32 bytes of standard input, credits them to the kernel's pool, and has it reseed its
/// generator from that; its exit code is that call's answer.
#[rustfmt::skip]
const CODE: &[u8] = &[
    0x48, 0x83, 0xec, 0x30,                         // sub  rsp, 48
    0x31, 0xff,                                     // xor  edi, edi
    0x48, 0x8d, 0x74, 0x24, 0x08,                   // lea  rsi, [rsp + 8]
    0xba, 0x20, 0x00, 0x00, 0x00,                   // mov  edx, 32
    0x31, 0xc0, 0x0f, 0x05,                         // read
    0x48, 0x8d, 0x3d, 0x43, 0x00, 0x00, 0x00,       // lea  rdi, [rip + path]
    0xbe, 0x02, 0x00, 0x00, 0x00,                   // mov  esi, O_RDWR
    0xb8, 0x02, 0x00, 0x00, 0x00, 0x0f, 0x05,       // open
    0x89, 0xc7,                                     // mov  edi, eax
    0xc7, 0x04, 0x24, 0x00, 0x01, 0x00, 0x00,       // mov  dword [rsp], 256 bits
    0xc7, 0x44, 0x24, 0x04, 0x20, 0x00, 0x00, 0x00, // mov  dword [rsp + 4], 32 bytes
    0xbe, 0x03, 0x52, 0x08, 0x40,                   // mov  esi, RNDADDENTROPY
    0x48, 0x89, 0xe2,                               // mov  rdx, rsp
    0xb8, 0x10, 0x00, 0x00, 0x00, 0x0f, 0x05,       // ioctl
    0xbe, 0x07, 0x52, 0x00, 0x00,                   // mov  esi, RNDRESEEDCRNG
    0x31, 0xd2,                                     // xor  edx, edx
    0xb8, 0x10, 0x00, 0x00, 0x00, 0x0f, 0x05,       // ioctl
    0x89, 0xc7,                                     // mov  edi, eax
    0xb8, 0xe7, 0x00, 0x00, 0x00, 0x0f, 0x05,       // exit_group
    // path:
    b'/', b'd', b'e', b'v', b'/', b'u', b'r', b'a', b'n', b'd', b'o', b'm', 0,
];

/// The program as a static ELF file for x86-64.
pub(super) fn program() -> Vec<u8> {
    let size = HEADERS + CODE.len() as u64;
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
    elf.extend(CODE);
    elf
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_program_is_an_elf_file_that_runs() {
        use std::io::Write;
        use std::os::unix::fs::PermissionsExt;
        use std::process::{Command, Stdio};

        let bytes = super::program();
        assert_eq!(bytes.len(), 64 + 56 + 107);
        if !cfg!(target_arch = "x86_64") {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("reseed");
        std::fs::write(&path, bytes).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut child = Command::new(path).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(&[7; 32]).unwrap();
        // As an unprivileged user the kernel refuses; in either case it ends by itself.
        assert!(child.wait().unwrap().code().is_some());
    }
}
