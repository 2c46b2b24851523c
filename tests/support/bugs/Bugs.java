// Usage: java Bugs BUG MIB: touch so many MiB of memory, then fail in one of several ways.
import java.lang.reflect.Field;
import sun.misc.Unsafe;

public class Bugs {
    static Unsafe unsafe() throws Exception {
        Field field = Unsafe.class.getDeclaredField("theUnsafe");
        field.setAccessible(true);
        return (Unsafe) field.get(null);
    }

    static void write() throws Exception { unsafe().putLong(0, 1); }
    static void copy() throws Exception { unsafe().copyMemory(8, 4096, 1 << 20); }
    static void fill() throws Exception { unsafe().setMemory(8, 1 << 20, (byte) 1); }
    static void exhaust() { long[][] all = new long[1 << 20][]; for (int i = 0; ; i++) all[i] = new long[1 << 20]; }

    public static void main(String[] words) throws Exception {
        byte[][] memory = new byte[2 * Integer.parseInt(words[1])][(1 << 19) - 64];
        for (byte[] each : memory) java.util.Arrays.fill(each, (byte) 7);
        switch (words[0]) {
            case "0": write(); break;
            case "1": copy(); break;
            case "2": fill(); break;
            case "3": exhaust(); break;
        }
        System.out.println(memory.length);
    }
}
