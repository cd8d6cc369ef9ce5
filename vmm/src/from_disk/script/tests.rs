//! What is made of scripts.

use super::*;

fn run(text: &str, environment: Option<&Variables>) -> Vec<(String, Option<String>, Boot)> {
    let uuids = ["0b0b-1".to_owned()];
    let statements = parse(text).unwrap();
    let mut machine = Machine::new("hd0,gpt1".to_owned(), environment, &uuids);
    let mut menu = Vec::new();
    machine.run(&statements, &mut menu);
    assert!(!machine.is_over);
    menu.iter().map(|item| (item.title.clone(), item.id.clone(), machine.boot(item))).collect()
}

#[test]
fn an_entry_is_read_with_its_variables_and_quotes() {
    let text = r#"
        set opts='quiet splash' # a comment
        function gfxmode { linux /never; }
        menuentry 'It'"'"'s "Debian"' --class os $menuentry_id_option 'the-id' {
            search --no-floppy --fs-uuid --set=root 0B0B-1
            linux /vmlinuz root=UUID=x "a b"\
                ${opts} $unset
            initrd /one \
                   (hd0,gpt2)/two
        }"#;
    let entries = run(text, None);
    let (title, id, boot) = &entries[0];
    assert_eq!((title.as_str(), id.as_deref()), ("It's \"Debian\"", Some("the-id")));
    let (kernel, cmdline) = boot.linux.clone().unwrap();
    assert_eq!(kernel, ("UUID=0b0b-1".to_owned(), "/vmlinuz".to_owned()));
    assert_eq!(cmdline, "root=UUID=x a b quiet splash");
    let initrds = [("UUID=0b0b-1", "/one"), ("hd0,gpt2", "/two")];
    assert_eq!(boot.initrds, initrds.map(|(device, path)| (device.to_owned(), path.to_owned())));
}

#[test]
fn conditions_decide() {
    let environment = Variables::from([("saved".to_owned(), "1".to_owned())]);
    let text = r#"
        if [ -s $prefix/grubenv ]; then load_env; fi
        if loadfont unicode; then set a=font; elif [ "$saved" = 1 ]; then set a=saved; else set a=other; fi
        if [ x$feature_platform_search_hint = xy ] ; then set b=hint; fi
        if [ "${none}" ]; then set c=no; else set c=yes; fi
        while true; do set a=loop; done
        menuentry X { linux /k $a $b $c; }"#;
    let with = run(text, Some(&environment));
    assert_eq!(with[0].2.linux.as_ref().unwrap().1, "saved hint yes");
    assert_eq!(run(text, None)[0].2.linux.as_ref().unwrap().1, "other hint yes");
}

#[test]
fn what_grows_without_bound_is_refused() {
    let doubling = format!("set a=xxxxxxxx\n{}", "set a=\"$a$a\"\n".repeat(40));
    let many: String = (0..100).map(|i| format!("set a{i}=1\n")).collect();
    // A command of 2 KiB that would have 400,000 words, and one whose words are empty.
    let repeated = format!("set a='{}'\nlinux{}\n", "x ".repeat(1000), " $a".repeat(400));
    let empty = format!("linux{}\n", " \"\"".repeat(70_000));
    for text in [doubling, many, repeated, empty] {
        let statements = parse(&text).unwrap();
        let mut machine = Machine::new(String::new(), None, &[]);
        machine.run(&statements, &mut Vec::new());
        assert!(machine.is_over);
    }
    assert!(parse(&"a {\n".repeat(1000)).is_err());
    assert!(parse(&"if a; then\n".repeat(1000)).is_err());
    assert!(parse(&"} fi done '".repeat(1000)).is_ok());
}
