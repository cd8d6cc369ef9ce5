# Drives the first virtio disk that it finds on the PCI bus: one queue, an interrupt for each request (MSI-X). Writes
# BLOCKS blocks, each with a pattern of its own, flushes, reads them back and compares.
#
# With `s` as the first letter of the command line it reads a byte before each block that it writes.
#
# Around the requests it writes < and >, so that whoever runs it can see what the requests cost outside the guest.
        .include "pvh.inc"

        .set BLOCKS, 200
        .set BLOCK, 4096
        .set QUEUE_SIZE, 16

        .set CONFIG_ADDRESS, 0xcf8
        .set CONFIG_DATA, 0xcfc
        .set DISK, 0x10421af4           # virtio 1.2, section 4.1.2: vendor and device of a block device
        .set CAPABILITY_VENDOR, 0x09
        .set CAPABILITY_MSIX, 0x11

        .set LAPIC, 0xfee00000
        .set LAPIC_EOI, LAPIC + 0xb0
        .set LAPIC_SPURIOUS, LAPIC + 0xf0
        .set VECTOR_CONFIG, 0x40
        .set VECTOR_QUEUE, 0x41
        .set VECTOR_SPURIOUS, 0xff

        .set FLUSH, 1 << 9              # VIRTIO_BLK_F_FLUSH
        .set READ, 0
        .set WRITE, 1
        .set FLUSH_NOW, 4

# Interrupts: the legacy controllers are masked, a gate for each vector that can come, the local APIC on.
main:   mov (%esi), %al
        mov %al, mode
        mov $(SERIAL + 1), %dx
        mov $1, %al                     # interrupts for received data: only then there is any
        out %al, %dx
        mov $0xff, %al
        out %al, $0x21
        out %al, $0xa1
        mov $VECTOR_CONFIG, %ecx
        mov $config_changed, %eax
        call gate
        mov $VECTOR_QUEUE, %ecx
        mov $queue_used, %eax
        call gate
        mov $VECTOR_SPURIOUS, %ecx
        mov $spurious, %eax
        call gate
        lidt idt_pointer
        movl $(0x100 | VECTOR_SPURIOUS), LAPIC_SPURIOUS

# The device: the first slot that has one.
        xor %ebx, %ebx
1:      mov %ebx, slot
        xor %ecx, %ecx
        call config_read
        cmp $DISK, %eax
        je found
        add $(1 << 11), %ebx
        cmp $(32 << 11), %ebx
        jb 1b
        mov $text_none, %edi
        jmp fail

found:  mov $4, %ecx                    # memory, and messages
        mov $6, %eax
        call config_write
        mov $0x10, %ecx
        call config_read
        and $~15, %eax
        mov %eax, bar

# Its capabilities: %esi is where one is, from its pointer.
        mov $0x34, %ecx
        call config_read
        movzbl %al, %esi
capability:
        test %esi, %esi
        jz set_up
        mov %esi, %ecx
        call config_read
        mov %eax, %ebp                  # identifier, next, length, kind
        cmpb $CAPABILITY_MSIX, %al
        jne 1f
        mov %esi, msix
        lea 4(%esi), %ecx
        call config_read
        and $~7, %eax
        add bar, %eax
        mov %eax, table
        jmp next
1:      cmpb $CAPABILITY_VENDOR, %al
        jne next
        lea 8(%esi), %ecx
        call config_read
        add bar, %eax
        mov %ebp, %edx
        shr $24, %edx
        cmp $4, %edx
        ja next
        mov %eax, places(, %edx, 4)
next:   movzbl %ch, %ecx
        mov %ebp, %eax
        movzbl %ah, %esi
        jmp capability

# MSI-X: the configuration's message, then the queue's.
set_up: mov msix, %ecx
        call config_read
        or $(1 << 31), %eax
        mov msix, %ecx
        call config_write
        mov table, %edi
        mov $VECTOR_CONFIG, %eax
        call entry
        mov $VECTOR_QUEUE, %eax
        call entry

# Reset, ACKNOWLEDGE, DRIVER, features, FEATURES_OK.
        mov common, %edi
        movb $0, 0x14(%edi)
1:      cmpb $0, 0x14(%edi)
        jne 1b
        movb $1, 0x14(%edi)
        movb $3, 0x14(%edi)
        movl $0, 0x08(%edi)
        movl $FLUSH, 0x0c(%edi)
        movl $1, 0x08(%edi)
        movl $1, 0x0c(%edi)             # VIRTIO_F_VERSION_1
        movb $0xb, 0x14(%edi)
        cmpb $0xb, 0x14(%edi)
        mov $text_features, %esi
        jne fail_there

# The queue, then DRIVER_OK.
        movw $0, 0x10(%edi)
        movw $0, 0x16(%edi)
        movw $QUEUE_SIZE, 0x18(%edi)
        movw $1, 0x1a(%edi)
        movl $descriptors, 0x20(%edi)
        movl $0, 0x24(%edi)
        movl $available, 0x28(%edi)
        movl $0, 0x2c(%edi)
        movl $used, 0x30(%edi)
        movl $0, 0x34(%edi)
        movw $1, 0x1c(%edi)
        cmpw $1, 0x1c(%edi)
        mov $text_queue, %esi
        jne fail_there
        movb $0xf, 0x14(%edi)

        mov $text_sectors, %edi
        call puts
        mov config, %edi
        mov (%edi), %eax
        call put_hex

        mov $'<', %al
        call putc
        xor %ebx, %ebx
1:      cmpb $'s', mode
        jne 2f
        call getc
2:      call fill
        mov $WRITE, %eax
        call request
        inc %ebx
        cmp $BLOCKS, %ebx
        jb 1b
        mov $FLUSH_NOW, %eax
        call request
        xor %ebx, %ebx
1:      mov $buffer, %edi
        mov $(BLOCK / 4), %ecx
        xor %eax, %eax
        rep stosl
        mov $READ, %eax
        call request
        call compare
        inc %ebx
        cmp $BLOCKS, %ebx
        jb 1b
        mov $'>', %al
        call putc

        mov $text_interrupts, %edi
        call puts
        mov interrupts, %eax
        call put_hex
        mov $text_same, %edi
        call puts
        jmp power_off

fail_there:
        mov %esi, %edi
fail:   call puts
        jmp power_off

# A request of the type in %eax for block %ebx, from or to the buffer; waits for its interrupt.
request:
        mov %eax, header
        movl $0, header + 4
        mov %ebx, %edx
        shl $3, %edx
        mov %edx, header + 8
        movl $0, header + 12
        movb $0xff, status
        movw $1, descriptors + 14       # next
        cmp $FLUSH_NOW, %eax
        jne 1f
        movw $2, descriptors + 14
1:      movw $1, descriptors + 28       # flags: goes on
        cmp $READ, %eax
        jne 1f
        movw $3, descriptors + 28       # goes on, and the device may write it
1:      movzwl available + 2, %edx
        mov %edx, %ecx
        and $(QUEUE_SIZE - 1), %ecx
        movw $0, available + 4(, %ecx, 2)
        inc %edx
        movw %dx, available + 2
        mov notify, %edi
        movw $0, (%edi)
        incl expected
# Interrupts come only in hlt: their routine leaves %eax and the flags different.
1:      cli
        mov expected, %ecx
        cmp %ecx, interrupts
        jb 2f
        cmp %cx, used + 2
        je 3f
2:      sti
        hlt
        jmp 1b
3:      cmpb $0, status
        jne 4f
        ret
4:      mov $text_status, %edi
        jmp fail

# The pattern of block %ebx: its number in the upper half of each word, counting in the lower.
fill:   mov %ebx, %eax
        shl $16, %eax
        mov $buffer, %edi
        mov $(BLOCK / 4), %ecx
1:      stosl
        inc %eax
        loop 1b
        ret

compare:
        mov %ebx, %eax
        shl $16, %eax
        mov $buffer, %edi
        mov $(BLOCK / 4), %ecx
1:      scasl
        jne 2f
        inc %eax
        loop 1b
        ret
2:      mov $text_different, %edi
        jmp fail

# Reads the register %ecx of the device's configuration space into %eax.
config_read:
        call config_select
        in %dx, %eax
        ret

# Writes %eax.
config_write:
        push %eax
        call config_select
        pop %eax
        out %eax, %dx
        ret

config_select:
        mov slot, %eax
        or %ecx, %eax
        or $(1 << 31), %eax
        mov $CONFIG_ADDRESS, %dx
        out %eax, %dx
        mov $CONFIG_DATA, %dx
        ret

# An entry of the MSI-X table at %edi with vector %eax; goes on to the next one.
entry:  movl $LAPIC, (%edi)
        movl $0, 4(%edi)
        mov %eax, 8(%edi)
        movl $0, 12(%edi)
        add $16, %edi
        ret

# Vector %ecx goes to %eax.
gate:   mov %ax, idt(, %ecx, 8)
        movw $0x10, idt + 2(, %ecx, 8)
        movw $0x8e00, idt + 4(, %ecx, 8)
        shr $16, %eax
        mov %ax, idt + 6(, %ecx, 8)
        ret

queue_used:
        incl interrupts
config_changed:
        movl $0, LAPIC_EOI
spurious:
        pop %eax                        # as IRET would, which a KVM that interprets does not know
        add $8, %esp
        sti
        jmp *%eax

# Writes %eax as a hexadecimal number and a newline.
put_hex:
        mov %eax, %ebx
        mov $8, %ecx
1:      rol $4, %ebx
        mov %ebx, %eax
        and $15, %eax
        mov digits(%eax), %al
        call putc
        loop 1b
        mov $'\n', %al
        jmp putc

        .data
idt_pointer:
        .word 256 * 8 - 1
        .long idt

# The chain of every request: header, data, status.
        .balign 16
descriptors:
        .quad header
        .long 16
        .word 1, 1
        .quad buffer
        .long BLOCK
        .word 1, 2
        .quad status
        .long 1
        .word 2, 0
        .skip 16 * (QUEUE_SIZE - 3)

digits: .ascii "0123456789abcdef"
text_none:
        .asciz "there is no disk\n"
text_features:
        .asciz "the features are refused\n"
text_queue:
        .asciz "the queue is refused\n"
text_status:
        .asciz "a request failed\n"
text_different:
        .asciz "a block is different\n"
text_sectors:
        .asciz "sectors "
text_interrupts:
        .asciz "\ninterrupts "
text_same:
        .asciz "all blocks are the same\n"

        .bss
        .balign 4096
buffer: .skip BLOCK
idt:    .skip 256 * 8
        .balign 16
available:
        .skip 4 + 2 * QUEUE_SIZE + 2
        .balign 16
used:   .skip 4 + 8 * QUEUE_SIZE + 2
        .balign 16
header: .skip 16
status: .skip 1
mode:   .skip 1
        .balign 4
slot:   .skip 4
bar:    .skip 4
msix:   .skip 4
table:  .skip 4
expected:
        .skip 4
interrupts:
        .skip 4
# By the kind of the capability.
places: .skip 4
common: .skip 4
notify: .skip 4
isr:    .skip 4
config: .skip 4
