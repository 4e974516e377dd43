# The guest's side of a system call: what LSTAR points to.
#
# On entry rax is the call's number, rcx the return address, r11 the flags; rdi, rsi, rdx, r10, r8
# and r9 are the arguments. All but rax, rcx and r11 keep their values.
#
# A call that can be answered here, from the data page behind this one, never leaves the machine.
# Everything in that page is the guest's to write: the host believes none of it, and what is wrong
# there harms the guest alone. On machines on which this code runs in ring 0 nothing but `exit` is
# ever reached.
#
# Data page: see `shim.rs`.

# Keeps what a handler is about to use, and puts it back. The guest's stack is not ours to use. A
# fault in between becomes an exit: the host puts the same back.
    .macro rund_save
    mov [rip + D + 0x1c0], rcx
    mov [rip + D + 0x1c8], rdi
    mov [rip + D + 0x1d0], rsi
    mov [rip + D + 0x1d8], rdx
    mov [rip + D + 0x1e0], rax
    .endm
    .macro rund_restore
    mov rcx, [rip + D + 0x1c0]
    mov rdi, [rip + D + 0x1c8]
    mov rsi, [rip + D + 0x1d0]
    mov rdx, [rip + D + 0x1d8]
    .endm

    .pushsection .rodata.rund_rt_shim, "a"
    .balign 4096
    .globl rund_rt_shim_start
    .hidden rund_rt_shim_start
rund_rt_shim_start:
.Lrund_start:
    .set D, .Lrund_start + 4096

    cmp rax, 1
    je .Lrund_write
    cmp rax, 228
    je .Lrund_clock
    cmp rax, 0
    je .Lrund_read
    cmp rax, 12
    je .Lrund_brk
    cmp rax, 9
    je .Lrund_mmap
    cmp rax, 10
    je .Lrund_mprotect
    cmp rax, 39
    je .Lrund_pid
    cmp rax, 186
    je .Lrund_pid
    cmp rax, 110
    je .Lrund_ppid
    cmp rax, 158
    je .Lrund_arch_prctl
    cmp rax, 218
    je .Lrund_pid
    cmp rax, 273
    je .Lrund_zero
    cmp rax, 334
    je .Lrund_no_such_call
    cmp rax, 102
    je .Lrund_uid
    cmp rax, 107
    je .Lrund_uid
    cmp rax, 104
    je .Lrund_gid
    cmp rax, 108
    je .Lrund_gid
    cmp rax, 13
    je .Lrund_action
    cmp rax, 318
    je .Lrund_entropy
    cmp rax, 157
    je .Lrund_prctl
    cmp rax, 302
    je .Lrund_limit

    .globl rund_rt_shim_exit
    .hidden rund_rt_shim_exit
rund_rt_shim_exit:
.Lrund_exit:
    out 0x80, eax
    .globl rund_rt_shim_return
    .hidden rund_rt_shim_return
rund_rt_shim_return:
    # Three bytes, which the host replaces by `sysretq` where this runs in ring 0.
    jmp rcx
    nop

.Lrund_done:
    inc qword ptr [rip + D + 0x00]
    jmp rund_rt_shim_return

.Lrund_pid:
    mov rax, [rip + D + 0x08]
    jmp .Lrund_done
.Lrund_ppid:
    mov rax, [rip + D + 0x10]
    jmp .Lrund_done
.Lrund_uid:
    mov rax, [rip + D + 0x18]
    jmp .Lrund_done
.Lrund_gid:
    mov rax, [rip + D + 0x20]
    jmp .Lrund_done
.Lrund_zero:
    xor eax, eax
    jmp .Lrund_done
.Lrund_no_such_call:
    mov rax, -38
    jmp .Lrund_done

# mprotect(address, len, rights): what the guest has is mapped for good, and no page becomes
# executable.
.Lrund_mprotect:
    test rdx, 4
    jnz .Lrund_exit
    test rdi, 4095
    jnz .Lrund_exit
    xor eax, eax
    jmp .Lrund_done

# arch_prctl(ARCH_SET_FS, address)
.Lrund_arch_prctl:
    cmp rdi, 0x1002
    jne .Lrund_exit
    mov r11, 0x7fc0000000
    cmp rsi, r11
    ja .Lrund_exit
    wrfsbase rsi
    xor eax, eax
    jmp .Lrund_done

# brk(address): the host shrinks, since what comes back later has to be zero.
.Lrund_brk:
    mov r11, [rip + D + 0x30]
    cmp rdi, r11
    jb .Lrund_brk_below
    cmp rdi, [rip + D + 0x38]
    ja .Lrund_exit
    mov [rip + D + 0x30], rdi
    mov rax, rdi
    jmp .Lrund_done
.Lrund_brk_below:
    cmp rdi, [rip + D + 0x28]
    jae .Lrund_exit
    mov rax, r11
    jmp .Lrund_done

# mmap(0, len, no more than read and write, MAP_PRIVATE | MAP_ANONYMOUS, ...): from the end of
# what was never used.
.Lrund_mmap:
    test rdi, rdi
    jnz .Lrund_exit
    cmp r10, 0x22
    jne .Lrund_exit
    test rdx, 4
    jnz .Lrund_exit
    test rsi, rsi
    jz .Lrund_exit
    mov r11, [rip + D + 0x40]
    mov rax, [rip + D + 0x48]
    sub rax, r11
    cmp rsi, rax
    mov rax, 9
    ja .Lrund_exit
    lea rax, [rsi + 4095]
    and rax, -4096
    add rax, r11
    mov [rip + D + 0x40], rax
    mov rax, r11
    jmp .Lrund_done

# clock_gettime(clock, timespec): of the first eight clocks, those whose bit is set.
.Lrund_clock:
    cmp rdi, 7
    ja .Lrund_exit
    mov r11, [rip + D + 0x58]
    bt r11, rdi
    jnc .Lrund_exit
    rund_save
    mov r11, [rip + D + 0x60]
    rdtsc
    shl rdx, 32
    or rax, rdx
    sub rax, [rip + D + 0x50]
    mul r11
    shrd rax, rdx, 32
    lea r11, [rip + D + 0x80]
    add rax, [r11 + rdi * 8]
    xor edx, edx
    mov r11, 1000000000
    div r11
    mov [rsi], rax
    mov [rsi + 8], rdx
    rund_restore
    xor eax, eax
    jmp .Lrund_done

# write(1 or 2, bytes, len): kept until the machine is left.
.Lrund_write:
    lea r11, [rip + D + 0xc0]
    cmp rdi, 1
    je .Lrund_write_kept
    lea r11, [rip + D + 0xe0]
    cmp rdi, 2
    jne .Lrund_exit
.Lrund_write_kept:
    rund_save
    mov rcx, [r11 + 16]
    sub rcx, [r11 + 8]
    jb .Lrund_exit_saved
    cmp rdx, rcx
    ja .Lrund_exit_saved
    mov rdi, [r11]
    add rdi, [r11 + 8]
    mov rcx, rdx
    cld
    rep movsb
    add [r11 + 8], rdx
    mov rax, rdx
    rund_restore
    jmp .Lrund_done

# read(fd, bytes, len) of a file with a window: what the window has, while it has something.
.Lrund_read:
    cmp rdi, 31
    ja .Lrund_exit
    lea r11, [rip + D + 0x100]
    movzx r11d, byte ptr [r11 + rdi]
    test r11d, r11d
    jz .Lrund_exit
    rund_save
    shl r11d, 5
    lea rcx, [rip + D + 0x100]
    add r11, rcx
    # r11: address of the next byte, bytes left, whether the file ends behind them.
    mov rcx, [r11 + 8]
    cmp rcx, rdx
    jae .Lrund_read_all
    cmp qword ptr [r11 + 16], 0
    je .Lrund_exit_saved
    jmp .Lrund_read_copy
.Lrund_read_all:
    mov rcx, rdx
.Lrund_read_copy:
    mov rax, rcx
    mov rdi, rsi
    mov rsi, [r11]
    cld
    rep movsb
    mov [r11], rsi
    sub [r11 + 8], rax
    rund_restore
    jmp .Lrund_done

# rt_sigaction(signal, new, old, 8). The new one is read first: it may be where the old one goes.
.Lrund_action:
    cmp r10, 8
    jne .Lrund_exit
    lea r11, [rdi - 1]
    cmp r11, 63
    ja .Lrund_exit
    cmp rdi, 9
    je .Lrund_exit
    cmp rdi, 19
    je .Lrund_exit
    rund_save
    shl r11, 5
    lea rcx, [rip + D + 0x800]
    add r11, rcx
    test rsi, rsi
    jz .Lrund_action_kept
    mov rax, [rsi]
    mov rcx, [rsi + 8]
    mov rdi, [rsi + 16]
    mov rsi, [rsi + 24]
    mov qword ptr [rip + D + 0x210], 1
    xchg rax, [r11]
    xchg rcx, [r11 + 8]
    xchg rdi, [r11 + 16]
    xchg rsi, [r11 + 24]
    jmp .Lrund_action_old
.Lrund_action_kept:
    mov rax, [r11]
    mov rcx, [r11 + 8]
    mov rdi, [r11 + 16]
    mov rsi, [r11 + 24]
.Lrund_action_old:
    test rdx, rdx
    jz .Lrund_action_done
    mov [rdx], rax
    mov [rdx + 8], rcx
    mov [rdx + 16], rdi
    mov [rdx + 24], rsi
.Lrund_action_done:
    rund_restore
    xor eax, eax
    jmp .Lrund_done

# getrandom(bytes, len, flags): from the end of what is left, which is forgotten.
.Lrund_entropy:
    cmp rdx, 3
    ja .Lrund_exit
    mov r11, [rip + D + 0x208]
    cmp r11, 0x80
    ja .Lrund_exit
    cmp rsi, r11
    ja .Lrund_exit
    rund_save
    sub r11, rsi
    mov [rip + D + 0x208], r11
    lea rax, [rip + D + 0x300]
    add r11, rax
    mov rcx, rsi
    mov rsi, r11
    cld
    rep movsb
    mov rdi, r11
    mov rcx, [rip + D + 0x1d0]
    xor eax, eax
    rep stosb
    rund_restore
    mov rax, rsi
    jmp .Lrund_done

# prctl(PR_SET_NAME, name) and prctl(PR_GET_NAME, name)
.Lrund_prctl:
    cmp rdi, 16
    je .Lrund_get_name
    cmp rdi, 15
    jne .Lrund_exit
    rund_save
    lea r11, [rip + D + 0x220]
    xor eax, eax
    mov [r11], rax
    mov [r11 + 8], rax
    xor ecx, ecx
.Lrund_set_name:
    mov al, [rsi + rcx]
    test al, al
    jz .Lrund_name_done
    mov [r11 + rcx], al
    inc ecx
    cmp ecx, 15
    jb .Lrund_set_name
    jmp .Lrund_name_done
.Lrund_get_name:
    rund_save
    mov rax, [rip + D + 0x220]
    mov rcx, [rip + D + 0x228]
    mov [rsi], rax
    mov [rsi + 8], rcx
.Lrund_name_done:
    rund_restore
    xor eax, eax
    jmp .Lrund_done

# prlimit64(0, RLIMIT_STACK, 0, old)
.Lrund_limit:
    test rdi, rdi
    jnz .Lrund_exit
    cmp rsi, 3
    jne .Lrund_exit
    test rdx, rdx
    jnz .Lrund_exit
    test r10, r10
    jz .Lrund_exit
    rund_save
    mov r11, [rip + D + 0x200]
    mov [r10], r11
    mov [r10 + 8], r11
    xor eax, eax
    jmp .Lrund_done

.Lrund_exit_saved:
    rund_restore
    mov rax, [rip + D + 0x1e0]
    jmp rund_rt_shim_exit

# Exceptions 0 to 31: the port says which.
    .balign 16
    .globl rund_rt_shim_exceptions
    .hidden rund_rt_shim_exceptions
rund_rt_shim_exceptions:
    .set rund_port, 0xa0
    .rept 32
    .byte 0xe6, rund_port
    .byte 0xeb, 0xfe
    .set rund_port, rund_port + 1
    .endr
    .globl rund_rt_shim_end
    .hidden rund_rt_shim_end
rund_rt_shim_end:
    .popsection
