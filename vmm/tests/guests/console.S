# Echoes what comes over the serial port until there is a `q`. With `i` as the first letter of the command line it waits
# for interrupts (line 4 of the I/O APIC); otherwise it polls.
        .include "pvh.inc"

        .set VECTOR, 0x40
        .set IOAPIC_SELECT, 0xfec00000
        .set IOAPIC_DATA, 0xfec00010
        .set LAPIC_EOI, 0xfee000b0
        .set LAPIC_SPURIOUS, 0xfee000f0
        .set LINE, 4

main:   cmpb $'i', (%esi)
        je by_interrupts
        call receive
        mov $ready, %edi
        call puts
1:      call getc
        cmp $'q', %al
        je power_off
        call putc
        jmp 1b

receive:
        mov $(SERIAL + 1), %dx
        mov $1, %al                     # interrupts for received data: only then there is any
        out %al, %dx
        ret

by_interrupts:
        mov $0xff, %al                  # the legacy controllers are masked
        out %al, $0x21
        out %al, $0xa1
        mov $interrupt, %eax            # a gate for the vector: 32-bit interrupt gate, selector 0x10
        mov %ax, vectors + 8 * VECTOR
        movw $0x10, vectors + 8 * VECTOR + 2
        movw $0x8e00, vectors + 8 * VECTOR + 4
        shr $16, %eax
        mov %ax, vectors + 8 * VECTOR + 6
        lidt table
        movl $0x1ff, LAPIC_SPURIOUS     # the local APIC is on
        movl $(0x10 + 2 * LINE), IOAPIC_SELECT
        movl $VECTOR, IOAPIC_DATA       # edge, not masked
        movl $(0x11 + 2 * LINE), IOAPIC_SELECT
        movl $0, IOAPIC_DATA            # to the first processor
        mov $ready, %edi
        call puts
        call receive                    # now: an edge at a masked line would be lost
        sti
1:      hlt
        jmp 1b

# Takes all that is there.
interrupt:
1:      mov $LINE_STATUS, %dx
        in %dx, %al
        test $1, %al
        jz 2f
        mov $SERIAL, %dx
        in %dx, %al
        cmp $'q', %al
        je power_off
        call putc
        jmp 1b
2:      movl $0, LAPIC_EOI
        pop %eax                        # as IRET would, which a KVM that interprets does not know
        add $8, %esp
        sti
        jmp *%eax

table:  .word 8 * (VECTOR + 1) - 1
        .long vectors
ready:  .asciz "ready\n"

        .bss
        .balign 16
vectors:
        .skip 8 * (VECTOR + 1)
