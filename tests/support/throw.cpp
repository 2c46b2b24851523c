// Dies of an exception that nobody catches.
#include <stdexcept>
#include <string>

struct Order {
    std::string name;
    void ship() const { throw std::runtime_error("no such order: " + name); }
};

int main()
{
    Order order{"blue"};
    order.ship();
}
