# Says "on", then does what the first letter of the command line says.
        .include "pvh.inc"

main:   mov $greeting, %edi
        call puts
        mov (%esi), %al
        cmp $'o', %al
        je power_off
        cmp $'r', %al
        je reset
        cmp $'k', %al
        je keyboard_reset
        cmp $'p', %al
        je panic
        cmp $'t', %al
        je triple_fault
        cmp $'x', %al
        je execute_nothing
        jmp halt

reset:  mov $RESET, %dx
        mov $1, %al
        out %al, %dx
        jmp halt

keyboard_reset:
        mov $0xfe, %al
        out %al, $0x64
        jmp halt

panic:  mov $PVPANIC, %dx
        in %dx, %al
        test $1, %al                    # it says that it knows this event
        jz halt
        mov $1, %al
        out %al, %dx
        jmp halt

triple_fault:
        lidt no_vectors
        ud2

execute_nothing:
        mov $0xd0000000, %eax           # no RAM, no device
        jmp *%eax

no_vectors:
        .word 0
        .long 0
greeting:
        .asciz "on\n"
