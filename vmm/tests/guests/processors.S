# Starts the second processor as an operating system does (INIT, then SIPI) and waits for what it writes. With `b` as the
# first letter of the command line the second processor jumps to where a BIOS would start again.
        .include "pvh.inc"

        .set LAPIC_ICR_LOW, 0xfee00300
        .set LAPIC_ICR_HIGH, 0xfee00310
        .set TRAMPOLINE, 0x10000        # a page of the first MiB, whose number the SIPI carries
        .set ALIVE, 0x11000

main:   mov (%esi), %al
        mov %al, letter
        mov $trampoline, %esi
        mov $TRAMPOLINE, %edi
        mov $(trampoline_end - trampoline), %ecx
        rep movsb
        movl $0, ALIVE
        movl $(1 << 24), LAPIC_ICR_HIGH
        movl $0x4500, LAPIC_ICR_LOW     # INIT
        movl $(0x4600 | (TRAMPOLINE >> 12)), LAPIC_ICR_LOW
1:      pause
        mov ALIVE, %eax
        test %eax, %eax
        jz 1b
        mov $second, %edi
        cmp $0x1234, %eax
        je 2f
        mov $wrong, %edi
2:      call puts
        jmp power_off

        .code16
trampoline:
        mov $(TRAMPOLINE >> 4), %ax
        mov %ax, %ds
        cmpb $'b', letter - trampoline
        je 2f
        movl $0x1234, ALIVE - TRAMPOLINE
1:      hlt
        jmp 1b
2:      ljmp $0xf000, $0xfff0
letter: .byte 0
trampoline_end:
        .code32
second: .asciz "the second processor runs\n"
wrong:  .asciz "it wrote something else\n"
