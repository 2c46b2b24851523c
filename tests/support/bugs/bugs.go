// Usage: bugs BUG MIB: touch so many MiB of memory, then fail in one of several ways.
package main

import (
	"os"
	"strconv"
	"sync"
)

type shape interface{ area() int }
type square struct{ side *int }

var memory []byte
var sink int

//go:noinline
func (s *square) area() int { return *s.side }

//go:noinline
func index(values []int, place int) int { return values[place] }

//go:noinline
func divide(value, by int) int { return value / by }

//go:noinline
func write(names map[string]int) int { names["a"] = 1; return len(names) }

//go:noinline
func convert(value interface{}) string { return value.(string) }

//go:noinline
func call(s shape) int { return s.area() }

//go:noinline
func give_up() int { panic("giving up") }

//go:noinline
func unlock() int { var lock sync.Mutex; lock.Unlock(); return 1 }

//go:noinline
func closed() int { channel := make(chan int); close(channel); close(channel); return 1 }

func main() {
	mib, _ := strconv.Atoi(os.Args[2])
	memory = make([]byte, mib<<20+1)
	for at := range memory {
		memory[at] = 7
	}
	none := len(os.Args) - 3
	switch os.Args[1] {
	case "0":
		sink = index([]int{1, 2, 3}, none+9)
	case "1":
		sink = divide(7, none)
	case "2":
		sink = write(nil)
	case "3":
		sink = len(convert(none))
	case "4":
		sink = call(&square{})
	case "5":
		sink = call(nil)
	case "6":
		sink = give_up()
	case "7":
		sink = unlock()
	case "8":
		sink = closed()
	}
}
