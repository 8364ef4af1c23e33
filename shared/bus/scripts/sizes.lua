-- Prelude: sizes, and sums of them, in a hash. One that is damaged may be anything, and stops nobody. They are written with
-- %.0f: before 7.2 Redis gets large numbers of Lua as 4.6e+18, which HINCRBY refuses.
local LARGEST = 2 ^ 53

-- Return the whole number, from 0 to LARGEST, that is nearest to what is in a field.
local function read_size(key, field)
  return math.floor(math.min(math.max(0, tonumber(redis.call('HGET', key, field)) or 0), LARGEST))
end

-- Change a sum. It is never less than nothing, whatever the size was that is taken off.
local function add_size(key, field, change)
  redis.call('HSET', key, field, string.format('%.0f', math.max(0, read_size(key, field) + change)))
end
