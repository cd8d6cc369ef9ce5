# Touches every port, some of them and a lot of memory that is no RAM in every width, and says what unknown places read as.
        .include "pvh.inc"

main:
# Reads from all ports; writes zeroes to all but the serial port's.
        xor %edx, %edx
ports:  in %dx, %al
        test $15, %dl                   # each access takes its time: one of sixteen ports gets the wide ones
        jnz 2f
        in %dx, %ax
        in %dx, %eax
2:      mov %edx, %eax
        sub $(SERIAL - 3), %eax
        cmp $11, %eax                   # an access of four bytes that meets it, too
        jb 1f
        xor %eax, %eax
        out %al, %dx
        test $15, %dl
        jnz 1f
        out %ax, %dx
        out %eax, %dx
1:      inc %edx
        cmp $0x10000, %edx
        jb ports

# Strings: many accesses to one port at once.
        mov $SERIAL, %dx
        mov $text, %esi
        mov $(text_end - text), %ecx
        rep outsb
        mov $0x2f8, %dx
        mov $buffer, %edi
        mov $100, %ecx
        rep insw
        mov $0x2f8, %dx
        mov $buffer, %esi
        mov $100, %ecx
        rep outsl

# Memory that is no RAM, also across its edges.
        mov $addresses, %esi
1:      lodsl
        test %eax, %eax
        jz 2f
        mov (%eax), %bl
        mov (%eax), %cx
        mov (%eax), %edi
        movl $0, (%eax)
        movw $0, (%eax)
        movb $0, (%eax)
        movl $0, 3(%eax)
        jmp 1b
2:
# What is not there reads as ones.
        mov $0x2f8, %dx
        in %dx, %eax
        inc %eax
        jnz bad
        mov 0xd0001000, %eax
        inc %eax
        jnz bad
        cmpw $0xffff, buffer + 198
        jne bad
        mov $good_text, %edi
        call puts
        jmp power_off
bad:    mov $bad_text, %edi
        call puts
        jmp power_off

# Behind RAM (the machine has less than 256 MiB), the PCI window, around the I/O APIC and the local APIC, the top.
addresses:
        .long 0x10000000, 0xbffffffe, 0xc0000000, 0xd0000001, 0xdffffffe, 0xe0000000, 0xfec01000, 0xfed00000
        .long 0xfee01000, 0xfffffff0, 0
text:   .ascii "a string of accesses\n"
text_end:
good_text:
        .asciz "all harmless\n"
bad_text:
        .asciz "something is there\n"

        .bss
buffer: .skip 400
