// Dies of a nil pointer, some frames deep, with goroutines and 30 MB. GOTRACEBACK=crash makes it dump core.
package main

import (
	"math/rand"
	"os"
	"runtime"
	"sync"
)

type order struct{ name *string }

//go:noinline
func ship(o *order, depth int) int {
	if depth > 0 {
		return ship(o, depth-1) + 1
	}
	return len(*o.name)
}

func main() {
	memory := make([]byte, 30<<20)
	rand.Read(memory)
	var locked sync.WaitGroup
	for i := 0; i < 8; i++ {
		locked.Add(1)
		go func() {
			runtime.LockOSThread()
			locked.Done()
			r, _, _ := os.Pipe()
			r.Read(memory[:1])
		}()
	}
	locked.Wait()
	println(ship(&order{}, 10), len(memory))
}
