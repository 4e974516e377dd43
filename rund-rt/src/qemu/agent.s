# The guest's first process from the point of the snapshot on. It says that it may be saved, takes
# what the host tells this one clone, and starts the program: by as few system calls as can be, since
# an emulated processor translates everything that runs here anew in each clone.
#
# What it takes: eight bytes of length, then a block that is put at the address for which the host
# made its pointers (`agent.rs` has the same offsets).

    .set RUND_BLOCK, 0x10000000
    .set USUAL, 65536               # room that is there before the snapshot
    .set HOST_NAME, 0               # address, length
    .set NOW, 16                    # struct timespec
    .set ENTROPY, 32                # struct rand_pool_info of 32 bytes
    .set CWD, 72
    .set PATHS, 80                  # what to start: the first that can be
    .set ARGV, 88
    .set ENVP, 96
    .set INPUT, 104                 # address, length
    .set END, 120                   # what is said before the exit code: address, length

    .macro rund_call number
    mov eax, \number
    syscall
    .endm

    .pushsection .rodata.rund_rt_agent, "a"
    .balign 16
    .globl rund_rt_agent_start
    .hidden rund_rt_agent_start
rund_rt_agent_start:
    mov r14, [rsp + 16]             # the first argument, or none
    sub rsp, 64
    mov r15d, RUND_BLOCK
    # It names, sets the clock of and resets the machine it is on: never any but one of its own.
    mov ebx, 1
    rund_call 39                    # getpid
    cmp eax, 1
    jne .Lagent_not_started
    # With an argument, that directory is the root from here on.
    test r14, r14
    jz .Lagent_open
    mov rdi, r14
    rund_call 80                    # chdir
    test eax, eax
    js .Lagent_fail
    lea rdi, [rip + .Lagent_here]
    lea rsi, [rip + .Lagent_root]
    xor edx, edx
    mov r10d, 8192                  # MS_MOVE
    xor r8d, r8d
    rund_call 165                   # mount
    test eax, eax
    js .Lagent_fail
    lea rdi, [rip + .Lagent_here]
    rund_call 161                   # chroot
    test eax, eax
    js .Lagent_fail
    lea rdi, [rip + .Lagent_root]
    rund_call 80

.Lagent_open:
    # r12: the kernel's entropy, r13: the program's standard input.
    lea rdi, [rip + .Lagent_urandom]
    mov esi, 0x80002                # O_RDWR | O_CLOEXEC
    rund_call 2                     # open
    test eax, eax
    js .Lagent_fail
    mov r12d, eax
    lea rdi, [rip + .Lagent_null]
    mov esi, 0x80000                # O_RDONLY | O_CLOEXEC
    rund_call 2
    test eax, eax
    js .Lagent_fail
    mov r13d, eax

    mov esi, USUAL
    call .Lagent_map
    mov edi, 1
    lea rsi, [rip + .Lagent_ready]
    mov edx, 11
    rund_call 1                     # write
    mov rsi, rsp
    mov edx, 8
    call .Lagent_read
    mov rbx, [rsp]
    cmp rbx, USUAL
    jbe .Lagent_room
    mov rsi, rbx
    call .Lagent_map
.Lagent_room:
    mov rsi, r15
    mov rdx, rbx
    call .Lagent_read

    # Its own name, time and entropy. One that cannot have them does not run.
    mov rdi, [r15 + HOST_NAME]
    mov rsi, [r15 + HOST_NAME + 8]
    rund_call 170                   # sethostname
    test eax, eax
    js .Lagent_fail
    xor edi, edi                    # CLOCK_REALTIME
    lea rsi, [r15 + NOW]
    rund_call 227                   # clock_settime
    test eax, eax
    js .Lagent_fail
    mov edi, r12d
    mov esi, 0x40085203             # RNDADDENTROPY
    lea rdx, [r15 + ENTROPY]
    rund_call 16                    # ioctl
    test eax, eax
    js .Lagent_fail
    # What was added is used a minute later at the earliest (drivers/char/random.c): now, rather.
    mov edi, r12d
    mov esi, 0x5207                 # RNDRESEEDCRNG
    xor edx, edx
    rund_call 16
    test eax, eax
    js .Lagent_fail

    mov rbp, [r15 + INPUT + 8]
    test rbp, rbp
    jz .Lagent_begin
    lea rdi, [rip + .Lagent_input]
    mov esi, 1                      # MFD_CLOEXEC
    rund_call 319                   # memfd_create
    test eax, eax
    js .Lagent_fail
    mov r13d, eax
    mov rsi, [r15 + INPUT]
    mov rdx, rbp
    mov edi, r13d
    call .Lagent_write
    mov edi, r13d
    xor esi, esi
    xor edx, edx
    rund_call 8                     # lseek

.Lagent_begin:
    lea rsi, [rip + .Lagent_begins]
    mov edx, 11
    mov edi, 1
    call .Lagent_write
    rund_call 58                    # vfork: nothing below may use the stack until exec
    test eax, eax
    js .Lagent_fail
    jz .Lagent_child
    mov ebx, eax
.Lagent_wait:
    mov edi, -1
    lea rsi, [rsp + 8]
    xor edx, edx
    xor r10d, r10d
    rund_call 61                    # wait4: of those that lost their parents, too
    test eax, eax
    js .Lagent_fail
    cmp eax, ebx
    jne .Lagent_wait

    mov rsi, [r15 + END]
    mov rdx, [r15 + END + 8]
    mov edi, 1
    call .Lagent_write
    mov ecx, [rsp + 8]
    mov eax, ecx
    shr eax, 8
    and eax, 255
    and ecx, 127
    jz .Lagent_digits
    lea eax, [rcx + 128]
.Lagent_digits:
    mov ecx, 10
    xor edx, edx
    div ecx
    add dl, '0'
    mov [rsp + 18], dl
    xor edx, edx
    div ecx
    add dl, '0'
    mov [rsp + 17], dl
    add al, '0'
    mov [rsp + 16], al
    mov byte ptr [rsp + 19], 10
    lea rsi, [rsp + 16]
    mov edx, 4
    mov edi, 1
    call .Lagent_write
    # Without ACPI there is no power to switch off: a reset ends QEMU, if the host has not yet. What
    # is still in the line's buffer has to leave it first.
    mov edi, 1
    mov esi, 0x5409                 # TCSBRK, with 1: drain
    mov edx, 1
    rund_call 16
.Lagent_fail:
    mov edi, 0xfee1dead
    mov esi, 672274793
    mov edx, 0x01234567
    rund_call 169                   # reboot
    ud2

.Lagent_child:
    mov edi, r13d
    xor esi, esi
    rund_call 33                    # dup2
    mov ebx, 126
    mov rdi, [r15 + CWD]
    rund_call 80                    # chdir
    test eax, eax
    js .Lagent_not_started
    mov ebx, 127
    mov r14, [r15 + PATHS]
.Lagent_next:
    mov rdi, [r14]
    test rdi, rdi
    jz .Lagent_not_started
    mov rsi, [r15 + ARGV]
    mov rdx, [r15 + ENVP]
    rund_call 59                    # execve
    add r14, 8
    cmp eax, -2                     # ENOENT
    je .Lagent_next
    cmp eax, -20                    # ENOTDIR
    je .Lagent_next
    mov ebx, 126
    jmp .Lagent_next
.Lagent_not_started:
    mov edi, ebx
    rund_call 231                   # exit_group

# Room for rsi bytes at the block, all of it there at once.
.Lagent_map:
    mov rdi, r15
    mov edx, 3                      # PROT_READ | PROT_WRITE
    mov r10d, 0x8032                # MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_POPULATE
    mov r8, -1
    xor r9d, r9d
    rund_call 9                     # mmap
    cmp rax, r15
    jne .Lagent_fail
    ret

# rdx bytes of standard input to rsi.
.Lagent_read:
    xor edi, edi
    rund_call 0                     # read
    test rax, rax
    jle .Lagent_fail
    add rsi, rax
    sub rdx, rax
    jnz .Lagent_read
    ret

# rdx bytes at rsi to descriptor edi.
.Lagent_write:
    rund_call 1
    test rax, rax
    jle .Lagent_fail
    add rsi, rax
    sub rdx, rax
    jnz .Lagent_write
    ret

.Lagent_urandom:
    .asciz "/dev/urandom"
.Lagent_null:
    .asciz "/dev/null"
.Lagent_here:
    .asciz "."
.Lagent_root:
    .asciz "/"
.Lagent_input:
    .asciz "input"
.Lagent_ready:
    .ascii "RUND-READY\n"
.Lagent_begins:
    .ascii "RUND-BEGIN\n"
    .globl rund_rt_agent_end
    .hidden rund_rt_agent_end
rund_rt_agent_end:
    .popsection
