// Usage: bugs BUG MIB: touch so many MiB of memory, then fail in one of several ways.
use std::cell::RefCell;
use std::collections::HashMap;
use std::hint::black_box;

#[inline(never)]
fn index(values: &[u32], place: usize) -> u32 {
    values[place]
}
#[inline(never)]
fn unwrap(text: Option<&str>) -> usize {
    text.unwrap().len()
}
#[inline(never)]
fn expect(text: &str) -> u32 {
    text.parse::<u32>().expect("a number")
}
#[inline(never)]
fn borrow(cell: &RefCell<u32>) -> u32 {
    let mut first = cell.borrow_mut();
    let second = cell.borrow_mut();
    *first += *second;
    *first
}
#[inline(never)]
fn divide(value: u32, by: u32) -> u32 {
    value / by
}
#[inline(never)]
fn look_up(names: &HashMap<String, u32>) -> u32 {
    names["nobody"]
}
#[inline(never)]
fn slice(text: &str, end: usize) -> usize {
    text[..end].len()
}
#[inline(never)]
fn point(address: usize) -> u8 {
    unsafe { std::ptr::read_volatile(address as *const u8) }
}

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let mib: usize = words[2].parse().unwrap();
    let memory = vec![7u8; (mib << 20) + 1];
    black_box(&memory);
    let none = black_box(0usize);
    let found = match words[1].as_str() {
        "0" => index(&[1, 2, 3], none + 9),
        "1" => unwrap(black_box(None)) as u32,
        "2" => expect(black_box("nine")),
        "3" => borrow(&RefCell::new(1)),
        "4" => divide(7, none as u32),
        "5" => look_up(&HashMap::new()),
        "6" => slice(black_box("héllo"), none + 2) as u32,
        "7" => point(none + 8) as u32,
        _ => 0,
    };
    black_box(found);
}
